"""A run in Weights & Biases. Project, entity, mode and key come from its own variables (WANDB_PROJECT, WANDB_MODE,
...); without a project it is `penstock`. A continued run goes on under the same id."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from penstock.tracking.tracker import Ledger, Status, Tracker


class Wandb:
    """See Tracker."""

    def __init__(self, run: Any, ledger: Ledger, run_dir: Path) -> None:
        self._run, self._ledger, self._run_dir = run, ledger, run_dir

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See Tracker."""
        if fresh := self._ledger.fresh(step, numbers):
            self._run.log(fresh, step=step)
            self._ledger.note(self._run.id, step, fresh)

    def artefacts(self, paths: Sequence[Path]) -> None:
        """See Tracker."""
        found = wandb.Artifact(f"run-{self._run.id}", type="penstock-run")
        for path in paths:
            found.add_file(str(path), name=path.relative_to(self._run_dir).as_posix())
        self._run.log_artifact(found)

    def end(self, status: Status) -> None:
        """See Tracker."""
        self._run.finish(exit_code=0 if status == "ok" else 1)


def open_tracker(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Go on with the run that was made before, or make one."""
    ledger = Ledger(run_dir / "tracking" / "wandb.json", os.environ.get("WANDB_RUN_ID"))
    run_id = ledger.run_id or uuid.uuid4().hex[:12]
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "penstock"),
        name=run_dir.absolute().name,
        id=run_id,
        resume="allow",
        dir=str(run_dir),
        config=dict(config),
        settings=wandb.Settings(silent=True, disable_git=True, disable_code=True),
    )
    ledger.note(run_id)
    return Wandb(run, ledger, run_dir)
