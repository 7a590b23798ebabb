"""What `open_run` does where dataset or run folder are at URIs: stage, lock, bring back, mirror."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.config import RunConfig
from penstock.engine.trainstate import Stopped
from penstock.report import differing_keys
from penstock.storage.progress import Progress
from penstock.storage.remote.files import open_remote
from penstock.storage.remote.lock import Lock, hold
from penstock.storage.remote.mirror import forget, open_mirror
from penstock.storage.remote.pull import pull
from penstock.storage.remote.stage import staged


@contextmanager
def staged_dataset(config: RunConfig, progress: Progress, stop: threading.Event) -> Iterator[None]:
    """Have the run's graph store on local disk while open; nothing to do where it is local anyway."""
    if config.remote.dataset is None:
        yield
        return

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        progress(stage, done, total, unit, **numbers)
        _end_if_stopped(stop)

    with staged(config.remote.dataset, config.dataset, progress=show):
        yield


@contextmanager
def held_run(config: RunConfig, stop: threading.Event) -> Iterator[Lock | None]:
    """Hold the lock of the run's URI; losing it sets `stop`, and the mirror then raises. None where there is no URI."""
    if config.remote.run_dir is None:
        yield None
        return
    owner = f"run {config.digest()} of {os.environ.get('USER', 'unknown user')}"
    with hold(config.remote.run_dir, owner, on_lost=stop.set, waiting=lambda: _end_if_stopped(stop)) as lock:
        yield lock


def bring_back(config: RunConfig, *, force: bool) -> None:
    """Copy the run from its URI where that is newer than the folder; with `force` delete it there instead.

    ValueError where the URI holds a run of another configuration.
    """
    uri = config.remote.run_dir
    if uri is None:
        return
    if force:
        forget(uri)
        return
    there = open_remote(uri).read_if_there("config.yaml")
    if there is not None:
        copy = config.run_dir / ".remote-config.yaml"
        copy.write_bytes(there)
        require_same(copy, config, uri)
        copy.unlink()
    pull(uri, config.run_dir)


def require_same(stored: Path, config: RunConfig, place: Path | str) -> None:
    """ValueError, naming the keys that differ, where the run at `place` was made with another configuration."""
    if stored.is_file() and (differing := differing_keys(stored, config)):
        raise ValueError(
            f"{place} was made with other values of {', '.join(differing)}; "
            "use them, choose another --run-dir, or delete what is there with --force"
        )


@contextmanager
def mirrored_run(config: RunConfig, lock: Lock | None) -> Iterator[None]:
    """Keep the run's URI up to date while open, and leave it so, also where the run fails or is stopped."""
    if config.remote.run_dir is None:
        yield
        return
    with open_mirror(config.run_dir, config.remote.run_dir, lock=lock, promises=(Stopped,)):
        yield


def _end_if_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped("stopped before the run was open; run the same command again to continue")
