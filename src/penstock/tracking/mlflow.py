"""A run in MLflow: the flat configuration as parameters, numbers by step, configuration and result as artefacts.

| from the environment | is |
|---|---|
| MLFLOW_TRACKING_URI | a server, a database, or a folder; without it what MLflow takes by default |
| MLFLOW_ALLOW_FILE_STORE | `true` lets recent versions take a folder |
| MLFLOW_RUN_ID | a run to write into, which whoever made it also ends |
| MLFLOW_EXPERIMENT_NAME | of a run that is made here; without it `penstock` |

A continued run goes on in the run that was made for it.
"""

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from penstock.tracking.tracker import Ledger, Status, Tracker

_PARAMS, _METRICS = 100, 1000  # of one request, by MLflow's API
_VALUE_LENGTH = 500  # of a parameter: the least that any version and store of MLflow takes
_STATUS = {"ok": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Mlflow:
    """See Tracker."""

    def __init__(self, client: MlflowClient, run_id: str, ledger: Ledger, run_dir: Path, *, ends: bool) -> None:
        self._client, self._run_id, self._ledger, self._ends = client, run_id, ledger, ends
        self._run_dir = run_dir

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """See Tracker."""
        fresh, now = self._ledger.fresh(step, numbers), int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in fresh.items()]
        for first in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run_id, metrics=metrics[first : first + _METRICS])
        if fresh:
            self._ledger.note(self._run_id, step, fresh)

    def describe(self, config: Mapping[str, Any]) -> None:
        """Write parameters that are not there yet: MLflow refuses to change one."""
        there = self._client.get_run(self._run_id).data.params
        missing = [Param(key, str(value)[:_VALUE_LENGTH]) for key, value in config.items() if key not in there]
        for first in range(0, len(missing), _PARAMS):
            self._client.log_batch(self._run_id, params=missing[first : first + _PARAMS])

    def artefacts(self, paths: Sequence[Path]) -> None:
        """See Tracker."""
        for path in paths:
            below = path.parent.relative_to(self._run_dir).as_posix()
            self._client.log_artifact(self._run_id, str(path), artifact_path=None if below == "." else below)

    def end(self, status: Status) -> None:
        """See Tracker."""
        if self._ends:
            self._client.set_terminated(self._run_id, status=_STATUS[status])


def _make_run(client: MlflowClient, name: str) -> str:
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "penstock")
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    return str(client.create_run(experiment_id, run_name=name).info.run_id)


def _open_client() -> MlflowClient:
    """A client whose store answers; RuntimeError says what to set where MLflow takes none."""
    try:
        client = MlflowClient()
        client.get_experiment_by_name("penstock")
        return client
    except Exception as error:  # of many kinds, by version and store
        has_database = importlib.util.find_spec("sqlalchemy") is not None
        folder = "a folder with MLFLOW_ALLOW_FILE_STORE=true"
        if "MLFLOW_ALLOW_FILE_STORE" in str(error):
            database = " or sqlite:///PATH" if has_database else ""
            raise RuntimeError(
                "this MLflow takes a folder only where MLFLOW_ALLOW_FILE_STORE=true is set; set it, or set "
                f"MLFLOW_TRACKING_URI to a server{database}"
            ) from error
        if not os.environ.get("MLFLOW_TRACKING_URI") and not has_database:
            raise RuntimeError(
                "this MLflow wants a database where nothing else is said, and mlflow-skinny has none; set "
                f"MLFLOW_TRACKING_URI to a server, or to {folder}, or install mlflow"
            ) from error
        raise


def open_tracker(run_dir: Path, config: Mapping[str, Any]) -> Tracker:
    """Attach to the run that is named or was made before, or make one."""
    client = _open_client()
    given = os.environ.get("MLFLOW_RUN_ID")
    ledger = Ledger(run_dir / "tracking" / "mlflow.json", given)
    run_id = ledger.run_id or _make_run(client, run_dir.absolute().name)
    ledger.note(run_id)
    if given is None:
        client.update_run(run_id, status="RUNNING")
    tracker = Mlflow(client, run_id, ledger, run_dir, ends=given is None)
    tracker.describe(config)
    return tracker
