"""A step that reports to an MLflow run of its caller: `mlflow run` and most platforms set MLFLOW_RUN_ID for it.

Credentials and MLFLOW_TRACKING_URI come from the environment, where `--track mlflow` reads them too.
"""

import os
import subprocess
import sys

import mlflow

COMMAND = ["penstock", "train", "s3://my-bucket/papers.graph", "--run-dir", "s3://my-bucket/runs/papers"]
COMMAND += ["--stage-dir", "/tmp/stage", "--epochs", "20", "--track", "mlflow"]


def main() -> int:
    with mlflow.start_run(run_id=os.environ.get("MLFLOW_RUN_ID")) as run:
        ended = subprocess.run(COMMAND, env={**os.environ, "MLFLOW_RUN_ID": run.info.run_id}, check=False)
    return ended.returncode  # 75: stopped with a checkpoint; run the step again


if __name__ == "__main__":
    sys.exit(main())
