"""What `open_run` does where dataset or run folder are at URIs: stage, lock, bring back, mirror."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.config import RunConfig
from penstock.engine.trainstate import Stopped
from penstock.storage.progress import Progress
from penstock.storage.remote.files import open_remote
from penstock.storage.remote.lock import Lock, hold
from penstock.storage.remote.mirror import RESULT, forget, open_mirror
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
    if config.results_uri is None:
        yield None
        return
    owner = f"run {config.digest()} of {os.environ.get('USER', 'unknown user')}"
    with hold(config.results_uri, owner, on_lost=stop.set, waiting=lambda: _end_if_stopped(stop)) as lock:
        yield lock


def bring_back(config: RunConfig, *, anew: bool) -> None:
    """Copy the run from its URI where that is newer than the folder; `anew` deletes it there instead."""
    uri = config.results_uri
    if uri is None:
        return
    if anew:
        forget(uri)
    else:
        pull(uri, config.results_dir)


def reopen(config: RunConfig) -> None:
    """Take the result away from a finished run that is to go on, so that no kill leaves it for that of all epochs."""
    if config.results_uri is not None:
        open_remote(config.results_uri).delete(RESULT)
    (config.results_dir / RESULT).unlink(missing_ok=True)


@contextmanager
def mirrored_run(config: RunConfig, lock: Lock | None) -> Iterator[None]:
    """Keep the run's URI up to date while open, and leave it so, also where the run fails or is stopped."""
    if config.results_uri is None:
        yield
        return
    with open_mirror(config.results_dir, config.results_uri, lock=lock, promises=(Stopped,)):
        yield


def _end_if_stopped(stop: threading.Event) -> None:
    if stop.is_set():
        raise Stopped("stopped before the run was open; run the same command again to continue")
