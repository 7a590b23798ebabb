"""Locks among the processes of a host, by flock: the kernel lets go of them when their holder dies, however it dies.

The lock file says who holds it, so that others can say it: `{"pid": ..., "host": ..., "since": seconds}`.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_POLL_S = 0.1


def describe_age(seconds: float) -> str:
    """Seconds as people say them: `12 minutes`."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} seconds"


def describe_owner(text: str) -> str:
    """Who a lock file says holds it, and since when."""
    try:
        value: dict[str, Any] = json.loads(text)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value["since"]))
        age = describe_age(time.time() - value["since"])
        return f"process {int(value['pid'])} on host {str(value['host'])[:100]} since {age} ({since})"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return text.strip()[:100] or "another process"


def owner_text() -> str:
    """What this process writes into a lock file."""
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()})


@contextmanager
def flocked(
    path: Path, *, shared: bool = False, wait_s: float = 0.0, waiting: Callable[[str], None] | None = None
) -> Iterator[str]:
    """Hold a lock file; yields what a holder that did not end cleanly left in it, mostly nothing.

    `waiting` is called now and then with a description of the holder. BlockingIOError, with that description, once
    the file was neither free nor touched for `wait_s`: a holder that is at work calls `os.utime` on it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as file:
        seen, deadline = 0, time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                touched = os.fstat(file.fileno()).st_mtime_ns
                if touched != seen:
                    seen, deadline = touched, time.monotonic() + wait_s
                file.seek(0)
                holder = describe_owner(file.read())
                if time.monotonic() >= deadline:
                    raise BlockingIOError(holder) from None
                if waiting is not None:
                    waiting(holder)
                time.sleep(_POLL_S)
        file.seek(0)
        left = file.read()
        if not shared:
            file.truncate(0)
            file.write(owner_text())
            file.flush()
        try:
            yield left
        finally:
            if not shared:
                file.truncate(0)  # what is left behind tells a clean end from another
