"""`status.json`: what the process that has a run folder is at, for `penstock inspect`; it goes when the process ends.

| key | is |
|---|---|
| `at` | time of day, in seconds |
| `stage` | the stage that moved last: `name`, `done`, `total`, `unit`, `rate` per second, `left_s` |
| `epoch` | the last epoch that ended, as in `EpochRecord`; None before |

It is there as soon as a process works on the run, or on the experiment, and written when a stage begins and every two
seconds. It may be lost at no cost: nothing but `inspect` reads it.
"""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.epochs import EpochRecord
from penstock.live import Stage, Stages

logger = logging.getLogger(__name__)

NAME = "status.json"
_EVERY_S = 2.0


class Status:
    """A `Progress` that keeps the file; used by the thread that works on the run."""

    def __init__(self, folder: Path) -> None:
        self._path, self._stages = folder / NAME, Stages()
        self._value: dict[str, Any] = {"at": 0.0, "stage": None, "epoch": None}
        self._write()

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        """See Progress."""
        is_new = stage not in self._stages.known
        self._value["stage"] = _describe(stage, self._stages.update(stage, done, total, unit, numbers))
        if is_new or self._is_due():
            self._write()

    def epoch(self, record: EpochRecord) -> None:
        """Take note of an epoch that ended."""
        self._value["epoch"] = asdict(record)
        if self._is_due():
            self._write()

    def close(self) -> None:
        """Take the file away."""
        self._path.unlink(missing_ok=True)

    def _is_due(self) -> bool:
        return time.monotonic() - self._written >= _EVERY_S

    def _write(self) -> None:
        self._written, self._value["at"] = time.monotonic(), time.time()
        temporary = self._path.with_name(f".{NAME}")
        try:
            temporary.write_text(json.dumps(self._value))
            temporary.replace(self._path)
        except OSError as error:  # a full disk ends what needs the disk, and that is not this
            logger.debug("%s could not be written: %s", self._path, error)


def _describe(name: str, stage: Stage) -> dict[str, Any]:
    amounts = {"done": stage.done, "total": stage.total, "unit": stage.unit}
    return {"name": name, **amounts, "rate": stage.rate, "left_s": stage.left_s}
