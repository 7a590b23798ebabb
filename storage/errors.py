"""Errors that callers catch. Every message says what is wrong, the value, the limit and the remedy."""

import errno
import sys
import traceback
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


class Outgrown(DoesNotFit):
    """Items to come are larger than what rolling windows were sized for; who starts them anew sizes them so.

    `num_inputs` is what the largest reads, where that is known.
    """

    def __init__(
        self, message: str, *, num_inputs: int = 0, host_bytes: int | None = None, disk_bytes: int | None = None
    ) -> None:
        super().__init__(message, host_bytes=host_bytes, disk_bytes=disk_bytes)
        self.num_inputs = num_inputs


class TryAgain(Exception):
    """Mixed into errors that the same command may not meet another time; the command line ends with exit code 75."""


class InUse(TryAgain, ValueError):
    """Another process holds what is asked for. The message names it."""


class MissingDependency(ImportError):
    """An optional library is not installed. The message names the command that brings it."""


class ForeignError(RuntimeError):
    """An error of code that is not ours, in another process; the message has its traceback."""


# What we call and what may refuse the arguments that users give us, so that its errors count as ours. Torch is none of
# them: it is the models that call it.
_OURS = {
    *(
        "penstock",
        "numpy",
        "numba",
        "pyarrow",
        "pydantic",
        "pydantic_core",
        "yaml",
        "fsspec",
        "s3fs",
        "gcsfs",
        "psutil",
    ),
    *("ray", "safetensors", "xxhash", "cyclopts", "matplotlib", "mlflow", "tensorboard", "wandb", "requests"),
}


def is_ours(error: BaseException) -> bool:
    """Whether our own code raised an error, or a library that it called; else a user's module did, or what it calls."""
    if type(error).__module__.partition(".")[0] == "penstock":  # which nobody else raises by accident
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package == "penstock":
            return True
        if package not in _OURS and package not in sys.stdlib_module_names:
            return False
    return True


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
