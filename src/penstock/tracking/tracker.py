"""Hand every record of `metrics.jsonl` to trackers, without ever holding up or ending what is tracked.

Each tracker has a thread of its own, behind a bounded queue: a slow one drops records, one that raises drops the
record, and both are counted and said at the end. Only the driver of a run tracks.

`metrics.jsonl` is the truth. A run that continues from a checkpoint goes through some steps again, to the same bits:
TensorBoard then hides what it has of them and gets them anew, MLflow and W&B keep what they have, see `Ledger`.
"""

import importlib
import importlib.util
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from penstock.engine.trainer import Stopped
from penstock.storage.errors import MissingDependency
from penstock.storage.extras import install_command
from penstock.storage.manifest import read_json, write_json
from penstock.storage.redaction import redact, redact_text
from penstock.tracking.config import TrackerName

logger = logging.getLogger(__name__)

Status = Literal["ok", "stopped", "failed"]
_QUEUED = 10_000  # records: hours of a service that does not answer
_GRACE_S = 30.0  # for what is still queued when the run is over
_MODULES: dict[TrackerName, str] = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """Where numbers go; made by `open_tracker(run_dir, config)` of its module and used by one thread."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a step; steps fall back where a run went on from a checkpoint."""

    def artefacts(self, paths: Sequence[Path]) -> None:
        """Keep copies of files of the run."""

    def end(self, status: Status) -> None:
        """Close; a `stopped` run will be continued."""


OpenTracker = Callable[[Path, Mapping[str, Any]], Tracker]


class Ledger:
    """Remembers, in a file, what a service has: the id of the run there, and the last step of each number.

    It begins anew where another `run_id` is asked for than the one that is in the file.
    """

    def __init__(self, path: Path, run_id: str | None = None) -> None:
        self._path = path
        found = read_json(path) if path.is_file() else {}
        if run_id not in (None, found.get("run_id")):
            found = {}
        self.run_id: str | None = run_id or found.get("run_id")
        self._last: dict[str, int] = found.get("last", {})

    def fresh(self, step: int, numbers: Mapping[str, float]) -> dict[str, float]:
        """The numbers that the service does not have yet."""
        return {name: value for name, value in numbers.items() if self._last.get(name, -1) < step}

    def note(self, run_id: str, step: int = -1, numbers: Mapping[str, float] | None = None) -> None:
        """Write down that the service has these."""
        self.run_id = run_id
        self._last |= dict.fromkeys(numbers or (), step)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, {"run_id": run_id, "last": self._last})


class _Courier:
    """One tracker on its own thread; errors are warned of once and counted."""

    def __init__(self, name: str, open_it: Callable[[], Tracker]) -> None:
        self._name, self._open = name, open_it
        self._queue: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_QUEUED)
        self._dropped, self._warned = 0, False
        self._thread = threading.Thread(target=self._run, name=f"penstock-track-{name}", daemon=True)
        self._thread.start()

    def send(self, action: Callable[[Tracker], None]) -> None:
        """Have the tracker do something, soon; never waits."""
        try:
            self._queue.put_nowait(action)
        except queue.Full:
            self._drop(f"it is more than {_QUEUED} records behind")

    def _drop(self, reason: str) -> None:
        self._dropped += 1
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s takes no records: %s; training goes on", self._name, reason)

    def _run(self) -> None:
        tracker: Tracker | None = None
        reason = ""
        try:
            tracker = self._open()
        except Exception as error:  # the boundary: services fail in their own ways, and none may end training
            reason = f"it could not be opened ({redact_text(f'{type(error).__name__}: {error}')})"
            self._warn(reason)
        while (action := self._queue.get()) is not None:
            if tracker is None:
                self._drop(reason)
                continue
            try:
                action(tracker)
            except Exception as error:
                self._drop(redact_text(f"{type(error).__name__}: {error}"))

    def close(self, status: Status) -> None:
        """Deliver what is queued, for some time, and say what was lost."""
        self.send(lambda tracker: tracker.end(status))
        ends = time.monotonic() + _GRACE_S
        try:
            self._queue.put(None, timeout=_GRACE_S)
        except queue.Full:
            pass  # the thread is stuck in a call; it is a daemon
        self._thread.join(max(0.0, ends - time.monotonic()))
        lost = self._dropped + (self._queue.qsize() if self._thread.is_alive() else 0)
        if lost:
            logger.warning("%s lost %d records of this run; metrics.jsonl has all of them", self._name, lost)


class Trackers:
    """All trackers of a run; made by `open_trackers`, which ends them."""

    def __init__(self, couriers: Sequence[_Courier]) -> None:
        self._couriers = couriers

    def observe(self, record: Mapping[str, Any]) -> None:
        """Hand on the numbers of a record of `metrics.jsonl`; returns at once."""
        step = int(record["step"])
        numbers = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for courier in self._couriers if numbers else ():
            courier.send(lambda tracker: tracker.log(step, numbers))

    def artefacts(self, paths: Sequence[Path]) -> None:
        """Have files of the run kept with its numbers; those that are not there are left out."""
        found = [path for path in paths if path.is_file()]
        for courier in self._couriers:
            courier.send(lambda tracker: tracker.artefacts(found))


def _find_opener(name: TrackerName) -> OpenTracker:
    """What opens a tracker; its library is looked for here, and loaded by the tracker's thread."""
    if importlib.util.find_spec(_MODULES[name]) is None:
        raise MissingDependency(
            f"track.trackers={name} needs {_MODULES[name]}, which is not installed; {install_command(name)}"
        )

    def open_it(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
        found: Tracker = importlib.import_module(f"penstock.tracking.{name}").open_tracker(run_dir, config)
        return found

    return open_it


def _status(error: BaseException) -> Status:
    return "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"


@contextmanager
def open_trackers(names: Sequence[TrackerName], run_dir: Path, config: Mapping[str, Any]) -> Iterator[Trackers]:
    """Open trackers for a run and end them with it. `config` is flat, see overrides.flatten; secrets are taken out.

    MissingDependency, before anything is done, where a library is not installed; nothing else is ever raised.
    """
    openers = [(name, _find_opener(name)) for name in names]
    described = redact(config)
    status: Status = "ok"
    with ExitStack() as stack:
        couriers = []
        for name, opener in openers:
            couriers.append(_Courier(name, lambda opener=opener: opener(run_dir, described)))  # type: ignore[misc]
            stack.callback(lambda courier: courier.close(status), couriers[-1])
        try:
            yield Trackers(couriers)
        except BaseException as error:
            status = _status(error)
            raise
