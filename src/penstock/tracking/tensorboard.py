"""Event files in `tensorboard/` of the run folder: tensorboard --logdir RUN."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tensorboardX import SummaryWriter

from penstock.tracking.tracker import Status, Tracker


class TensorBoard:
    """See Tracker. A step that comes again hides it and all later ones of earlier files, which TensorBoard does for
    `purge_step`."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        self._writer: SummaryWriter | None = None
        self._last: dict[str, int] = {}

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See Tracker."""
        if self._writer is None or all(self._last.get(name, -1) >= step for name in numbers):
            self._begin(step)
        assert self._writer is not None
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._last |= dict.fromkeys(numbers, step)
        self._writer.flush()  # a process that is killed has a checkpoint, whose steps are not written again

    def _begin(self, step: int) -> None:
        """Open a file in which a run goes on at a step."""
        is_first = not self._folder.is_dir()
        if self._writer is not None:
            self._writer.close()
        self._last.clear()
        # without the suffix, a file that is opened within the same second replaces the last one
        self._writer = SummaryWriter(str(self._folder), purge_step=step, filename_suffix=f".{time.time_ns()}")
        if is_first:
            text = yaml.safe_dump(dict(self._config), sort_keys=False)
            self._writer.add_text("config", "".join(f"    {line}\n" for line in text.splitlines()), 0)

    def artefacts(self, paths: Sequence[Path]) -> None:
        """They are in the run folder already."""

    def end(self, status: Status) -> None:
        """See Tracker."""
        if self._writer is not None:
            self._writer.close()


def open_tracker(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """See Tracker."""
    return TensorBoard(run_dir / "tensorboard", config)
