"""Where compiled kernels are kept between processes.

Numba keeps them beside the source, or in the home folder; on a read-only install without a home it can do neither and
refuses to define a kernel. Then they go to a folder of this user among the temporary ones.
"""

import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

_settings: Any = numba.config  # a module that fills itself in


def _probe() -> None:
    """Numba chooses a folder for each source file, and all of ours are in one folder."""


def cache_folder() -> Path | None:
    """The folder that Numba keeps our kernels in, None where it finds none that it can write to."""
    try:
        return Path(FunctionCache(_probe).cache_path)  # type: ignore[no-untyped-call]
    except RuntimeError:  # "no locator available"
        return None


def is_temporary() -> bool:
    """Whether kernels are kept in the folder of last resort, and so may be compiled anew after a restart."""
    return cache_folder() is not None and _settings.CACHE_DIR == str(_folder())


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"penstock-numba-{os.getuid()}"


def ensure_cache() -> None:
    """Have Numba keep kernels in a temporary folder where it has no other; ValueError where there is none either.

    The folder has to be this user's alone: what is in it is unpickled and run.
    """
    if cache_folder() is not None:
        return
    remedy = "set NUMBA_CACHE_DIR to a folder that this user can write to"
    try:
        folder = _folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ValueError(
            f"compiled kernels can be kept neither here, at home, nor in a temporary folder ({error}); {remedy}"
        ) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(f"{folder} belongs to another user, or others may write to it; delete it, or {remedy}")
    _settings.CACHE_DIR = str(folder)
