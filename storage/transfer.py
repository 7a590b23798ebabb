"""Ask another host for things over TCP, and get files and rows in return, checked on arrival.

Both sides know a random token, which never goes over the wire: each proves it by an HMAC over the other's random bytes
before anything else is read. Every later head (a JSON object of bounded size) carries an HMAC under a key of that
connection alone, over its direction and number, so that heads can be neither forged, replayed nor reordered. Payloads
are raw bytes whose length and xxh3-64 the head tells; that finds damage, not an attacker on the path, who could read
them anyway: use a network that you trust. Nothing is ever unpickled, and no peer names a path.

Every wait on a socket has an end. On the wire, after the greetings (server: magic, 32 random bytes; client: 32 random
bytes, proof; server: proof): head bytes (uint32, big-endian), head, HMAC-SHA256 (32 bytes), payload.
"""

import hmac
import json
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import xxhash

from penstock.storage.errors import FormatError

logger = logging.getLogger(__name__)

Address = tuple[str, int]
Head = dict[str, Any]
TOKEN_BYTES = 32
MAX_HEAD_BYTES = 1 << 20
_MAGIC = b"PENSTK01"
_RANDOM_BYTES, _PROOF_BYTES = 32, 32
_CHUNK_BYTES = 1 << 20
_GREETING_S = 10.0
_ACCEPT_S = 0.5  # how often the accepting thread looks whether it is wanted


class TransferError(ConnectionError):
    """The other side is gone, is not who it should be, or speaks nonsense; the connection is of no use any more."""


class Damaged(FormatError):
    """A payload arrived, and is not what its checksum says; the connection is as good as before."""


class Refused(RuntimeError):
    """The other side answered with an error; `kind` is the name of its class."""

    def __init__(self, message: str, kind: str = "RuntimeError") -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.kind)


def new_token() -> bytes:
    """A fresh token; give it to those who may ask, by a channel that others cannot read."""
    return secrets.token_bytes(TOKEN_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What goes back: `head`, and as payload either `data`, or all `file_bytes` of `file`, whose checksum is known.

    `xxh3` None is computed from `data`; of a file it is what was found when the file was made, or empty where the one
    who asks knows the checksums of its parts.
    """

    head: Head
    data: Any = b""
    file: Path | None = None
    file_bytes: int = 0
    xxh3: str | None = None


class Session(Protocol):
    """What one connection may ask for; used by one thread."""

    def answer(self, head: Head, payload: bytes) -> Answer:
        """Answer a request; what it raises goes to the other side as Refused."""

    def close(self) -> None:
        """The connection is over."""


class Sink(Protocol):
    """Where a payload goes as it comes."""

    def write(self, data: memoryview, /) -> object:
        """Take the next bytes; they are overwritten afterwards."""


class Channel:
    """A connection whose other side has proved that it knows the token. Not safe for several threads."""

    def __init__(self, sock: socket.socket, key: bytes, mine: Literal[b"client", b"server"]) -> None:
        self._sock, self._key, self._mine = sock, key, mine
        self._theirs = b"server" if mine == b"client" else b"client"
        self._sent = self._received = 0
        self._buffer = bytearray(_CHUNK_BYTES)

    def set_timeout(self, timeout_s: float) -> None:
        """From now on wait so long for each piece."""
        self._sock.settimeout(timeout_s)

    def _tag(self, side: bytes, number: int, head: bytes) -> bytes:
        return hmac.digest(self._key, b"%s %d " % (side, number) + head, "sha256")

    def send(self, answer: Answer) -> None:
        """Send a head and its payload."""
        view = memoryview(answer.data).cast("B")
        num_bytes = len(view) if answer.file is None else answer.file_bytes
        xxh3 = xxhash.xxh3_64_hexdigest(view) if answer.xxh3 is None else answer.xxh3
        text = json.dumps(answer.head | {"payload": num_bytes, "xxh3": xxh3}).encode()
        if len(text) > MAX_HEAD_BYTES:
            raise ValueError(f"a head of {len(text)} bytes is over the limit of {MAX_HEAD_BYTES}; send it as payload")
        tag = self._tag(self._mine, self._sent, text)
        self._sent += 1
        self._sock.sendall(struct.pack("!I", len(text)) + text + tag)
        if answer.file is None:
            self._sock.sendall(view)
        elif num_bytes:
            with open(answer.file, "rb") as file:
                sent = self._sock.sendfile(file, 0, num_bytes)
            if sent != num_bytes:
                raise TransferError(f"{answer.file} has {sent} of {num_bytes} bytes; the other side waits for more")

    def receive_head(self) -> Head:
        """Wait for a head and check who it is from; TransferError where it is malformed or forged."""
        (num_bytes,) = struct.unpack("!I", receive_exactly(self._sock, 4))
        if num_bytes > MAX_HEAD_BYTES:
            raise TransferError(f"a head of {num_bytes} bytes is over the limit of {MAX_HEAD_BYTES}")
        text = receive_exactly(self._sock, num_bytes)
        tag = receive_exactly(self._sock, _PROOF_BYTES)
        if not hmac.compare_digest(tag, self._tag(self._theirs, self._received, text)):
            raise TransferError("a head was changed on its way, or is not from the one who knows the token")
        self._received += 1
        try:
            head = json.loads(text)
        except ValueError as error:
            raise TransferError(f"a head is no JSON ({error})") from error
        is_head = isinstance(head, dict) and isinstance(head.get("payload"), int) and isinstance(head.get("xxh3"), str)
        if not is_head or head["payload"] < 0:
            raise TransferError("a head is not what it should be")
        found: Head = head
        return found

    def receive_payload(self, head: Head, sink: Sink, limit: int, *, sink_checks: bool = False) -> None:
        """Pass the payload on as it comes; Damaged where its checksum is another than the head's.

        TransferError, with nothing read, where it is larger than `limit`. A sink that checks needs no checksum.
        """
        left = head["payload"]
        if left > limit:
            raise TransferError(f"a payload of {left} bytes is over the limit of {limit}")
        digest, view = xxhash.xxh3_64(), memoryview(self._buffer)
        while left:
            count = self._sock.recv_into(view[: min(left, len(view))])
            if count == 0:
                raise TransferError(f"the connection ended {left} bytes before the end of a payload")
            if not sink_checks:
                digest.update(view[:count])
            sink.write(view[:count])
            left -= count
        if not sink_checks and digest.hexdigest() != head["xxh3"]:
            raise Damaged(
                f"a payload of {head['payload']} bytes arrived with checksum {digest.hexdigest()}, its sender's says "
                f"{head['xxh3']}; ask again"
            )

    def close(self) -> None:
        """End the connection, also under a thread that waits on it; a second call does nothing."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()


class _Bytes:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: memoryview, /) -> None:
        self.data += data


def receive_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """Read so many bytes; TransferError where the connection ends before."""
    data = bytearray()
    while len(data) < num_bytes:
        piece = sock.recv(num_bytes - len(data))
        if not piece:
            raise TransferError("the other side ended the connection")
        data += piece
    return bytes(data)


def _prove(token: bytes, side: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(token, b"penstock " + side + first + second, "sha256")


def _greet_client(sock: socket.socket, token: bytes) -> Channel:
    mine = secrets.token_bytes(_RANDOM_BYTES)
    sock.sendall(_MAGIC + mine)
    theirs, proof = receive_exactly(sock, _RANDOM_BYTES), receive_exactly(sock, _PROOF_BYTES)
    if not hmac.compare_digest(proof, _prove(token, b"client", mine, theirs)):
        raise TransferError("it has another token")
    sock.sendall(_prove(token, b"server", theirs, mine))
    return Channel(sock, _prove(token, b"heads", mine, theirs), b"server")


def _greet_server(sock: socket.socket, token: bytes) -> Channel:
    if receive_exactly(sock, len(_MAGIC)) != _MAGIC:
        raise TransferError("it is no Penstock feeder of this release")
    theirs, mine = receive_exactly(sock, _RANDOM_BYTES), secrets.token_bytes(_RANDOM_BYTES)
    sock.sendall(mine + _prove(token, b"client", theirs, mine))
    try:
        proof = receive_exactly(sock, _PROOF_BYTES)
    except TransferError as error:
        raise TransferError("it refused our token") from error
    if not hmac.compare_digest(proof, _prove(token, b"server", mine, theirs)):
        raise TransferError("it does not know our token")
    return Channel(sock, _prove(token, b"heads", theirs, mine), b"client")


class Client:
    """Asks, one question at a time; a context manager. Made by `connect`.

    Any OSError (TransferError and timeouts are such) leaves it useless; Refused and Damaged do not.
    """

    def __init__(self, channel: Channel, address: Address) -> None:
        self._channel, self.address = channel, address

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; may be called from another thread, to end a wait."""
        self._channel.close()

    def ask(self, head: Head, payload: Any = b"", *, limit: int = 1 << 30) -> tuple[Head, bytes]:
        """Ask, and take a payload of at most `limit` bytes into memory."""
        sink = _Bytes()
        return self.ask_into(head, sink, payload, limit=limit), bytes(sink.data)

    def ask_into(
        self, head: Head, sink: Sink, payload: Any = b"", *, limit: int = 1 << 62, sink_checks: bool = False
    ) -> Head:
        """Ask, and pass the payload on; Refused where the answer is an error, Damaged where bytes were.

        With `sink_checks` the sink compares checksums itself.
        """
        self._channel.send(Answer(head=head, data=payload))
        answer = self._channel.receive_head()
        if "error" in answer:
            raise Refused(str(answer["error"]), str(answer.get("kind")))
        self._channel.receive_payload(answer, sink, limit, sink_checks=sink_checks)
        return answer

    def set_timeout(self, timeout_s: float) -> None:
        """From now on wait so long for each piece of an answer."""
        self._channel.set_timeout(timeout_s)


def connect(address: Address, token: bytes, *, timeout_s: float) -> Client:
    """Connect, and prove to each other who we are; OSError where nobody answers in time, or not the right one."""
    sock = socket.create_connection(address, timeout=timeout_s)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Client(_greet_server(sock, token), address)
    except BaseException:
        sock.close()
        raise


class Server:
    """Accepts connections on a thread, and serves each on another; made by `serve`."""

    def __init__(
        self, listener: socket.socket, token: bytes, open_session: Callable[[], Session], *, idle_s: float, limit: int
    ) -> None:
        self._listener, self._token, self._open_session = listener, token, open_session
        self._idle_s, self._limit = idle_s, limit
        self._lock, self._stopped = threading.Lock(), False
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self.address: Address = listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="penstock-accept", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._stopped:
            try:
                sock, peer = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._stopped:
                    return
                logger.warning("a connection could not be accepted: %s", error)  # too many files are open, mostly
                time.sleep(_ACCEPT_S)
                continue
            thread = threading.Thread(target=self._serve, args=(sock, peer), name="penstock-serve", daemon=True)
            with self._lock:
                self._sockets.add(sock)
                self._threads.add(thread)
            thread.start()

    def _serve(self, sock: socket.socket, peer: Any) -> None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(_GREETING_S)
            channel = _greet_client(sock, self._token)
            sock.settimeout(self._idle_s)
            session = self._open_session()
            try:
                while not self._stopped:
                    self._answer(channel, session)
            finally:
                session.close()
        except OSError as error:
            if not self._stopped:
                logger.info("the connection from %s is over: %s", peer[0], error)
        finally:
            sock.close()
            with self._lock:
                self._sockets.discard(sock)
                self._threads.discard(threading.current_thread())

    def _answer(self, channel: Channel, session: Session) -> None:
        head, sink = channel.receive_head(), _Bytes()
        try:
            channel.receive_payload(head, sink, self._limit)
            answer = session.answer(head, bytes(sink.data))
        except TransferError:
            raise
        except Exception as error:  # a boundary: the one who asked is told
            logger.debug("a request failed", exc_info=True)
            answer = Answer(head={"error": str(error) or repr(error), "kind": type(error).__name__})
        channel.send(answer)

    def close(self) -> None:
        """Stop accepting, end all connections and wait for their threads."""
        self._stopped = True
        self._listener.close()
        with self._lock:
            sockets, threads = list(self._sockets), list(self._threads)
        for sock in sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in [self._thread, *threads]:
            thread.join(2 * _GREETING_S)


@contextmanager
def serve(
    host: str,
    token: bytes,
    open_session: Callable[[], Session],
    *,
    idle_s: float = 60.0,
    limit: int = 1 << 30,
) -> Iterator[Server]:
    """Serve on a free port of `host`, an address of one interface, until the context is left.

    A connection that asks nothing for `idle_s` is over. Requests may bring payloads of up to `limit` bytes.
    """
    if len(token) != TOKEN_BYTES:
        raise ValueError(f"a token of {len(token)} bytes; make one of {TOKEN_BYTES} with new_token()")
    with socket.create_server((host, 0)) as listener:
        listener.settimeout(_ACCEPT_S)
        server = Server(listener, token, open_session, idle_s=idle_s, limit=limit)
        try:
            yield server
        finally:
            server.close()
