"""Transfer over real sockets: who may ask, what arrives, what is noticed when bytes or heads are changed on the way."""

import json
import logging
import os
import pickle
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import xxhash

from penstock.storage.transfer import (
    MAX_HEAD_BYTES,
    TOKEN_BYTES,
    Address,
    Answer,
    Channel,
    Client,
    Damaged,
    Head,
    Refused,
    Server,
    TransferError,
    connect,
    new_token,
    serve,
)

TOKEN = bytes(range(TOKEN_BYTES))
FILE = os.urandom(3_000_001)


class Echo:
    """Gives back what it gets, or the file; counts those that are open."""

    num_open = 0

    def __init__(self, file: Path) -> None:
        self._file = file
        Echo.num_open += 1

    def answer(self, head: Head, payload: bytes) -> Answer:
        if head["op"] == "file":
            size = self._file.stat().st_size
            return Answer(head={}, file=self._file, file_bytes=size, xxh3=xxhash.xxh3_64_hexdigest(FILE))
        if head["op"] == "fail":
            raise ValueError("no such thing")
        return Answer(head={"heard": head["op"]}, data=payload)

    def close(self) -> None:
        Echo.num_open -= 1


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "file").write_bytes(FILE)
    with serve("127.0.0.1", TOKEN, lambda: Echo(tmp_path / "file")) as found:
        yield found
    assert Echo.num_open == 0


def client_of(address: Address, token: bytes = TOKEN) -> Client:
    return connect(address, token, timeout_s=10)


@contextmanager
def between(server: Server, change: Callable[[bytearray, int], None]) -> Iterator[Address]:
    """A man in the middle: `change` may alter each piece of what the server says, given its place in the stream."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def carry(source: socket.socket, target: socket.socket, alter: Callable[[bytearray, int], None] | None) -> None:
            done = 0
            try:
                while data := bytearray(source.recv(1 << 16)):
                    if alter is not None:
                        alter(data, done)
                    done += len(data)
                    target.sendall(data)
            except OSError:
                pass
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        def run() -> None:
            near, _ = listener.accept()
            with near, socket.create_connection(server.address) as far:
                back = threading.Thread(target=carry, args=(far, near, change))
                back.start()
                carry(near, far, None)
                back.join()

        thread = threading.Thread(target=run)
        thread.start()
        yield listener.getsockname()[:2]
        thread.join(20)
        assert not thread.is_alive()


def flip(place: int) -> Callable[[bytearray, int], None]:
    def change(data: bytearray, at: int) -> None:
        if at <= place < at + len(data):
            data[place - at] ^= 1

    return change


GREETING = 8 + 32 + 32  # what a server says before its first head


def test_questions_bring_payloads_and_files(server: Server) -> None:
    with client_of(server.address) as client, client_of(server.address) as other:
        for payload in (b"", b"x", os.urandom(2_500_000)):
            head, data = client.ask({"op": "echo"}, payload)
            assert head["heard"] == "echo" and data == payload
        assert other.ask({"op": "file"})[1] == client.ask({"op": "file"})[1] == FILE


def test_an_error_is_told_and_ends_nothing(server: Server) -> None:
    with client_of(server.address) as client:
        with pytest.raises(Refused, match="no such thing") as caught:
            client.ask({"op": "fail"})
        assert caught.value.kind == "ValueError"
        assert pickle.loads(pickle.dumps(caught.value)).kind == "ValueError"
        assert client.ask({"op": "echo"}, b"on")[1] == b"on"


def test_without_the_token_nothing_is_said(server: Server, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    for token in (bytes(TOKEN_BYTES), TOKEN[:-1] + b"x"):
        with pytest.raises(TransferError, match="token"):
            client_of(server.address, token)
    with socket.create_connection(server.address) as sock:  # one that does not even greet
        sock.settimeout(10)
        sock.recv(40, socket.MSG_WAITALL)
        sock.sendall(bytes(64))
        assert sock.recv(100) == b""
    with client_of(server.address) as client:
        assert client.ask({"op": "echo"}, b"!")[1] == b"!"
    assert TOKEN.hex() not in caplog.text and repr(TOKEN) not in caplog.text


def test_a_server_that_does_not_know_the_token_is_left() -> None:
    with serve("127.0.0.1", new_token(), lambda: Echo(Path("/nowhere"))) as other:
        with pytest.raises(TransferError, match="token"):
            client_of(other.address)
    with pytest.raises(ValueError, match="new_token"), serve("127.0.0.1", b"secret", lambda: Echo(Path("/nowhere"))):
        pass


def test_a_changed_payload_is_noticed_and_the_connection_lives(server: Server) -> None:
    with client_of(server.address) as plain:
        plain.ask({"op": "file"})
    head = {"payload": len(FILE), "xxh3": xxhash.xxh3_64_hexdigest(FILE)}
    first = GREETING + 4 + len(json.dumps(head)) + 32
    for place in (first, first + len(FILE) - 1):
        with between(server, flip(place)) as address, client_of(address) as client:
            with pytest.raises(Damaged, match="ask again"):
                client.ask({"op": "file"})
            assert client.ask({"op": "file"})[1] == FILE


@pytest.mark.parametrize("place", [GREETING - 1, GREETING + 6, GREETING + 4 + 20])
def test_a_changed_greeting_or_head_ends_the_connection(server: Server, place: int) -> None:
    with between(server, flip(place)) as address:
        with pytest.raises(TransferError), client_of(address) as client:
            client.ask({"op": "echo"}, b"!")


def test_a_file_that_is_damaged_on_the_servers_disk_is_noticed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILE[:-1] + b"?" if FILE[-1:] != b"?" else FILE[:-1] + b"!")
    with client_of(server.address) as client, pytest.raises(Damaged):
        client.ask({"op": "file"})


def test_sizes_are_bounded(server: Server) -> None:
    with client_of(server.address) as client, pytest.raises(TransferError, match="over the limit of 100"):
        client.ask({"op": "file"}, limit=100)
    with client_of(server.address) as client, pytest.raises(ValueError, match="send it as payload"):
        client.ask({"op": "x" * MAX_HEAD_BYTES})


def test_silence_has_an_end(tmp_path: Path) -> None:
    with serve("127.0.0.1", TOKEN, lambda: Echo(tmp_path / "file"), idle_s=0.2) as server:
        with client_of(server.address) as client:
            with pytest.raises(OSError):
                for _ in range(100):
                    client.ask({"op": "echo"})
                    threading.Event().wait(0.3)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        with pytest.raises(TimeoutError):
            connect(mute.getsockname()[:2], TOKEN, timeout_s=0.2)


def test_leaving_ends_the_connections(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILE)
    with serve("127.0.0.1", TOKEN, lambda: Echo(tmp_path / "file")) as server:
        client = client_of(server.address)
    with pytest.raises(OSError):
        client.ask({"op": "echo"})
        client.ask({"op": "echo"})
    client.close()
    assert Echo.num_open == 0


def test_a_head_that_is_too_long_is_not_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock:
            sock.settimeout(10)
            far, _ = listener.accept()
            with far:
                far.sendall(struct.pack("!I", MAX_HEAD_BYTES + 1))
                with pytest.raises(TransferError, match="over the limit"):
                    Channel(sock, bytes(32), b"client").receive_head()
