import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from penstock.storage.remote.files import open_remote
from penstock.storage.remote.lock import LOCK, LockLost, hold

# Holds a lock until it is told to end, and says what becomes of it.
HOLDER = """
import sys, threading
from penstock.storage.remote.lock import LockLost, hold
lost = threading.Event()
try:
    with hold(sys.argv[1], "the holder", refresh_s=float(sys.argv[2]), on_lost=lost.set) as lock:
        print("held", flush=True)
        if lost.wait(30):
            print("lost", flush=True)
        lock.check()
except LockLost as error:
    print(error, flush=True)
"""


def start_holder(uri: str, refresh_s: float) -> "subprocess.Popen[str]":
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, uri, str(refresh_s)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def stored(folder: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / LOCK).read_bytes())
    return value


@pytest.fixture(params=["file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/run"


def test_a_lock_is_held_refreshed_and_released(uri: str) -> None:
    remote = open_remote(uri)
    with hold(uri, "me", refresh_s=0.1) as lock:
        lock.check()
        first = json.loads(remote.read(LOCK))
        assert (first["owner"], first["pid"], first["token"]) == ("me", os.getpid(), lock.token)
        deadline = time.monotonic() + 20
        while json.loads(remote.read(LOCK))["refreshed"] == first["refreshed"]:
            assert time.monotonic() < deadline, "not refreshed"
            time.sleep(0.02)
    assert remote.names() == []
    with hold(uri, "me again", refresh_s=0.1):
        pass


def test_a_live_holder_is_named_with_its_age(tmp_path: Path) -> None:
    uri = (tmp_path / "run").as_uri()
    holder = start_holder(uri, 0.2)
    wanted = rf"run is in use by the holder \(process {holder.pid} on host .*\) since \d+ seconds, .*--run-dir"
    with pytest.raises(ValueError, match=wanted), hold(uri, "me", refresh_s=0.2):
        pass
    assert stored(tmp_path / "run")["pid"] == holder.pid
    holder.kill()
    holder.communicate()


def test_the_lock_of_a_killed_process_of_this_machine_is_taken_over_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = (tmp_path / "run").as_uri()
    holder = start_holder(uri, 200.0)
    holder.kill()
    holder.communicate()
    with hold(uri, "me", refresh_s=0.2):
        assert stored(tmp_path / "run")["owner"] == "me"
    assert "over from the holder" in caplog.text


def test_the_lock_of_another_machine_is_taken_over_when_it_was_not_refreshed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = (tmp_path / "run").as_uri()
    now = time.time()
    value = {"owner": "other", "host": "far", "pid": 1, "process": "boot pid:[1] 1 2.0", "token": "t"}
    times = {"since": now + 5000, "refreshed": now + 5000, "refresh_s": 0.1}  # its clock is wrong: that must not matter
    open_remote(uri).write(LOCK, json.dumps({**value, **times}).encode())
    with hold(uri, "me", refresh_s=0.2):
        assert stored(tmp_path / "run")["owner"] == "me"
    assert "taking" in caplog.text and "over from other (process 1 on host far)" in caplog.text


def test_a_live_lock_of_another_machine_is_not_taken_over_whatever_its_clock_says(tmp_path: Path) -> None:
    uri, done = (tmp_path / "run").as_uri(), threading.Event()
    remote = open_remote(uri)

    def refresh() -> None:
        number = 0
        while not done.wait(0.05):
            number += 1
            value = {"owner": "other", "host": "far", "pid": 1, "process": "b p 1 2.0", "token": "t", "refresh_s": 0.2}
            remote.write(LOCK, json.dumps({**value, "since": 0, "refreshed": number}).encode())

    thread = threading.Thread(target=refresh)
    thread.start()
    while not remote.size(LOCK):
        time.sleep(0.01)
    with pytest.raises(ValueError, match="in use by other"), hold(uri, "me", refresh_s=0.2):
        pass
    done.set()
    thread.join()


@pytest.mark.parametrize("left", [b"", b"{", b"[]"])
def test_a_damaged_lock_counts_as_one_that_nobody_refreshes(tmp_path: Path, left: bytes) -> None:
    uri = (tmp_path / "run").as_uri()
    open_remote(uri).write(LOCK, left)

    def waiting() -> None:
        if (
            tmp_path / "run" / LOCK
        ).read_bytes() == left:  # a minute's wait; another writes what it should have written
            open_remote(uri).write(LOCK, b'{"refresh_s": 0.05}')

    with hold(uri, "me", refresh_s=0.1, waiting=waiting):
        assert stored(tmp_path / "run")["owner"] == "me"


def test_a_wait_for_a_dead_holder_can_be_ended(tmp_path: Path) -> None:
    uri = (tmp_path / "run").as_uri()
    open_remote(uri).write(LOCK, b"{}")

    def waiting() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), hold(uri, "me", waiting=waiting):
        pass


def test_a_holder_that_slept_too_long_stops_instead_of_writing(tmp_path: Path) -> None:
    uri = (tmp_path / "run").as_uri()
    holder = start_holder(uri, 0.2)
    os.kill(holder.pid, signal.SIGSTOP)
    with hold(uri, "me", refresh_s=0.2):
        os.kill(holder.pid, signal.SIGCONT)
        said, errors = holder.communicate(timeout=30)
        assert "lost\n" in said and "was taken over by me (process" in said, errors
        assert stored(tmp_path / "run")["owner"] == "me"


def test_of_many_that_want_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    uri = (tmp_path / "run").as_uri()
    holder = start_holder(uri, 5.0)
    holder.kill()
    holder.communicate()
    counts, most = [0], [0]
    start = threading.Barrier(4)

    def want(name: str) -> None:
        start.wait()
        with suppress(ValueError), hold(uri, name, refresh_s=0.3):
            counts[0] += 1
            most[0] = max(most[0], counts[0])
            time.sleep(0.7)
            counts[0] -= 1

    threads = [threading.Thread(target=want, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_losing_the_lock_is_told_once_and_the_file_of_the_other_stays(tmp_path: Path) -> None:
    uri, told = (tmp_path / "run").as_uri(), []
    with hold(uri, "me", refresh_s=30, on_lost=lambda: told.append(1)) as lock:
        open_remote(uri).write(LOCK, b'{"token": "other", "owner": "thief", "pid": 7, "host": "far"}')
        for _ in range(2):
            with pytest.raises(LockLost, match="taken over by thief"):
                lock.check()
    assert told == [1] and stored(tmp_path / "run")["owner"] == "thief"
