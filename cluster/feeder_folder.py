"""The folder of a feeder in the one that the feeders of a host share, and what is left of those that were killed."""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".lock"


def sweep(folder: Path) -> None:
    """Delete what feeders that are dead left in their shared folder: nobody holds the lock of theirs."""
    for found in folder.glob("feeder-*"):
        try:
            fd = os.open(found / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            continue  # about to be locked, or to go
        try:
            with suppress(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(found, ignore_errors=True)
        finally:
            os.close(fd)


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Make a folder in the shared one, which is deleted when the context is left, or by whoever sweeps after a kill."""
    folder.mkdir(parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # a well-known name in /tmp may be another user's trap
        raise PermissionError(f"{folder} belongs to user {folder.stat().st_uid}; delete it, or choose another folder")
    sweep(folder)
    own = folder / f"feeder-{os.getpid()}-{secrets.token_hex(4)}"
    own.mkdir(mode=0o700)
    fd = os.open(own / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        os.close(fd)
