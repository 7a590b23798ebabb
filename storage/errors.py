"""Errors that callers catch. Every message says what is wrong, the value, the limit and the remedy."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DataError(ValueError):
    """The user's data is bad: out of range, not finite, of the wrong width, missing, unreadable."""


class FormatError(DataError):
    """A file of ours is not what its manifest says: another version, truncated, a wrong checksum."""


class DoesNotFit(ValueError):
    """A budget, or the disk, is too small. The message names the smallest that would do.

    Where the planner knows it, `host_bytes` or `disk_bytes` has that smallest budget, for callers that had a share.
    """

    def __init__(self, message: str, *, host_bytes: int | None = None, disk_bytes: int | None = None) -> None:
        super().__init__(message)
        self.host_bytes, self.disk_bytes = host_bytes, disk_bytes


class MissingDependency(ImportError):
    """An optional library is not installed. The message names the command that brings it."""


@contextmanager
def full_disk_is_clear(path: Path) -> Iterator[None]:
    """Turn a full disk into `DoesNotFit` that names `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DoesNotFit(
                f"the disk is full while writing {path}: {error.strerror}; "
                "free space there, lower --disk, or choose another folder; what was finished is kept"
            ) from error
        raise
