"""A lock on a remote folder: `.lock.json` in it, refreshed by its holder, taken over when it is not.

`{"owner", "host", "pid", "process", "token", "since", "refreshed", "refresh_s"}`. Clocks of hosts may differ, so a
holder counts as dead only when its file was seen not to change for 4 x `refresh_s` of our own clock (2 x where the
file's time is old already); and at once where it was a process of this machine that has ended. A holder that was only
asleep finds another token when it wakes, and must not write any more.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from penstock.storage.errors import DataError, InUse
from penstock.storage.remote.files import RemoteFolder, open_remote
from penstock.storage.remote.hostlock import describe_age

logger = logging.getLogger(__name__)

LOCK = ".lock.json"
REFRESH_S = 15.0
_STALE = 4  # in refresh_s
_LONGEST_REFRESH_S = 300.0


class LockLost(InUse):
    """Another process has taken the lock over while this one did not refresh it."""


def _process() -> str:
    """Name this process so that others of the same machine and pid namespace can see whether it lives."""
    return f"{_machine()} {os.getpid()} {psutil.Process().create_time():.2f}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)  # then nobody recognises it, and its age decides


def _has_ended(process: object) -> bool:
    """Whether it is certain that the process ended: it was one of this machine, and is no more."""
    machine, pid, started = (str(process).rsplit(" ", 2) + ["", ""])[:3]
    if machine != _machine() or not pid.isdecimal():
        return False
    try:
        found = psutil.Process(int(pid))
        return f"{found.create_time():.2f}" != started or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


def _parse(data: bytes) -> dict[str, Any]:
    """What a lock file says; nothing where it is only half written, or not ours."""
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object, lowest: float, highest: float, default: float) -> float:
    return min(highest, max(lowest, value)) if isinstance(value, int | float) else default


def _describe(value: dict[str, Any]) -> str:
    if "token" not in value:
        return "another process"
    now = time.time()
    since, refreshed = (_number(value.get(name), 0.0, now, now) for name in ("since", "refreshed"))
    owner, pid, host = (str(value.get(name))[:100] for name in ("owner", "pid", "host"))
    return (
        f"{owner} (process {pid} on host {host}) since {describe_age(now - since)}, "
        f"last refreshed {describe_age(now - refreshed)} ago"
    )


class Lock:
    """A held lock; made by `hold`, which refreshes it in a thread. `lost` is set once another process has it."""

    def __init__(self, remote: RemoteFolder, owner: str, refresh_s: float, on_lost: Callable[[], None]) -> None:
        self.remote, self.lost = remote, threading.Event()
        self._refresh_s, self._on_lost = refresh_s, on_lost
        self.token = secrets.token_hex(16)
        self._value = {
            "owner": owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": _process(),
            "token": self.token,
            "since": time.time(),
            "refresh_s": refresh_s,
        }
        self._taken_by = "another process"
        self._closing = threading.Event()
        self._writing = threading.Lock()  # a refresh must not come after the release

    def data(self) -> bytes:
        """The file's bytes as of now."""
        return json.dumps({**self._value, "refreshed": time.time()}, indent=1).encode()

    def check(self) -> None:
        """LockLost where another process has the lock; asks the remote file system."""
        if not self.lost.is_set():
            data = self.remote.read_if_there(LOCK)
            if data is not None and _parse(data).get("token") == self.token:
                return
            self._taken_by = "nobody: its file was deleted" if data is None else _describe(_parse(data))
            self.lost.set()
            self._on_lost()
        raise LockLost(
            f"{self.remote.uri} was taken over by {self._taken_by}, while this process "
            "did not refresh its lock; nothing more is written there. Run the command again when that run has ended"
        )

    def keep(self) -> None:
        """Refresh until closed or lost; runs in a thread. What cannot be reached now is tried again later."""
        said = False
        while not self._closing.wait(self._refresh_s):
            try:
                with self._writing:
                    if self._closing.is_set():
                        return
                    self.check()
                    self.remote.write(LOCK, self.data())
                said = False
            except LockLost as error:
                logger.error("%s", error)
                return
            except (OSError, DataError) as error:
                if not said:
                    logger.warning("the lock of %s cannot be refreshed now: %s", self.remote.uri, error)
                said = True

    def release(self) -> None:
        """Stop refreshing, and delete the file if it is still ours."""
        self._closing.set()
        with self._writing:
            try:
                self.check()
                self.remote.delete(LOCK)
            except LockLost:
                pass
            except (OSError, DataError) as error:
                logger.warning(
                    "the lock of %s could not be deleted, others will wait for it: %s", self.remote.uri, error
                )


def _wait_until_dead(remote: RemoteFolder, data: bytes, waiting: Callable[[], None]) -> bytes | None:
    """Watch a lock file; returns its bytes once it is stale, None to try again. InUse where it lives."""
    value = _parse(data)
    refresh_s = _number(value.get("refresh_s"), 0.02, _LONGEST_REFRESH_S, REFRESH_S)
    age = _number(time.time() - _number(value.get("refreshed"), 0, 1e12, time.time()), 0, 2 * refresh_s, 0)
    deadline = time.monotonic() + _STALE * refresh_s - age
    if not _has_ended(value.get("process")):
        logger.warning("%s is in use by %s; seeing whether it still lives", remote.uri, _describe(value))
    while not _has_ended(value.get("process")) and time.monotonic() < deadline:
        waiting()
        time.sleep(min(refresh_s / 8, 0.5))
        now = remote.read_if_there(LOCK)
        if now is None or (now != data and not value):  # one that was half written is to be looked at again
            return None
        if now != data:
            raise InUse(f"{remote.uri} is in use by {_describe(_parse(now))}; wait for it, or choose another --run-dir")
    return data


def _take(lock: Lock, refresh_s: float, waiting: Callable[[], None]) -> None:
    """Get the lock, or InUse with its owner and age."""
    remote = lock.remote
    for _ in range(8):  # each round, another process was faster
        settle = not remote.creates_atomically
        if not remote.create(LOCK, lock.data()):
            there = remote.read_if_there(LOCK)
            dead = None if there is None else _wait_until_dead(remote, there, waiting)
            if dead is None or remote.read_if_there(LOCK) != dead:
                continue
            logger.warning("taking %s over from %s, which has not refreshed it", remote.uri, _describe(_parse(dead)))
            remote.write(LOCK, lock.data())
            settle = True
        if settle:
            time.sleep(min(2.0, refresh_s / 2))  # long enough for others that do the same to have written
        if _parse(remote.read_if_there(LOCK) or b"").get("token") == lock.token:
            return
    raise InUse(f"{remote.uri}: other processes take its lock all the time; wait, or choose another --run-dir")


@contextmanager
def hold(
    uri: str,
    owner: str,
    *,
    refresh_s: float = REFRESH_S,
    on_lost: Callable[[], None] = lambda: None,
    waiting: Callable[[], None] = lambda: None,
    remote: RemoteFolder | None = None,
) -> Iterator[Lock]:
    """Hold the lock of a remote folder; `on_lost` is called once if another process takes it over.

    InUse names the holder where there is a live one (found out within its `refresh_s`); one that is dead is
    waited for, 4 x its `refresh_s` at most, and taken over with a warning. What `waiting` raises ends the wait.
    """
    lock = Lock(remote or open_remote(uri), owner, refresh_s, on_lost)
    _take(lock, refresh_s, waiting)
    thread = threading.Thread(target=lock.keep, name="penstock-lock", daemon=True)
    thread.start()
    try:
        yield lock
    finally:
        lock.release()
        thread.join(1.0)
