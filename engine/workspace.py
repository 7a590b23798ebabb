"""Scratch folders that processes beside each other do not share, and that a killed one leaves to the next.

A folder is `KEY-N` in a common parent and is held by a lock on its `.lock`, which the kernel lets go of when the holder
dies. Who comes looks at the folders that nobody holds: one of its own key is continued, others are deleted. That and
the deletion of a folder that is done happen under the lock of the parent, for a moment.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from penstock.storage.errors import InUse
from penstock.storage.remote.hostlock import flocked

_LOCK = ".lock"
_PATIENCE_S = 600.0  # the parent is locked while folders are deleted, which on a slow disk takes a while


@contextmanager
def own_folder(parent: Path, key: str) -> Iterator[Path]:
    """Hold a folder for what `key` says is computed, with what a killed holder of the key left in it.

    It is deleted at the end, and left where there is an error, to be continued; an empty one never stays.
    """
    parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with _tidying(parent):
            folder = _choose(parent, key, held)
        try:
            yield folder
        except BaseException:
            if any(path.name != _LOCK for path in folder.iterdir()):
                raise
            _delete(parent, folder)
            raise
        _delete(parent, folder)


@contextmanager
def _tidying(parent: Path) -> Iterator[None]:
    """Hold the parent's lock; InUse where another process does not let go of it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(flocked(parent / _LOCK, wait_s=_PATIENCE_S))
        except BlockingIOError as error:
            raise InUse(f"{parent} has been in use by {error} for {_PATIENCE_S:g} s; run the command again") from error
        yield


def _choose(parent: Path, key: str, held: ExitStack) -> Path:
    """Continue a folder of the key that nobody holds, or make one; delete what else nobody holds."""
    chosen: Path | None = None
    for path in sorted(parent.iterdir()):
        if not path.is_dir():
            continue
        with ExitStack() as stack:
            try:
                stack.enter_context(flocked(path / _LOCK))
            except BlockingIOError:
                continue
            if chosen is None and path.name.rpartition("-")[0] == key:
                chosen = path
                held.push(stack.pop_all())
            else:
                shutil.rmtree(path, ignore_errors=True)
    if chosen is None:
        chosen = next(path for n in count() if not (path := parent / f"{key}-{n}").exists())
        held.enter_context(flocked(chosen / _LOCK))
    return chosen


def _delete(parent: Path, folder: Path) -> None:
    with _tidying(parent):
        shutil.rmtree(folder, ignore_errors=True)
