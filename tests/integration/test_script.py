"""Training from a script as README has it: plain lines, without `if __name__ == "__main__"`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph

_SCRIPT = """
import json, sys
import penstock

print("the script begins", file=sys.stderr)
options = json.loads(sys.argv[3])
flags = {"dataset": sys.argv[1], "run_dir": sys.argv[2], "train.epochs": 1, **options}
flags |= {"sampler.batch_size": 50, "budgets.host_memory": "64MiB"}
report = penstock.train(penstock.load_config(flags=flags))
print(report["metrics"]["steps"])
"""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"plan.mode": "rolling"}, id="rolling"),
        pytest.param({"cluster.replicas": 2}, id="replicas", marks=pytest.mark.slow),
        pytest.param({"cluster.feeders": 1}, id="a feeder", marks=pytest.mark.slow),
    ],
)
def test_its_lines_run_once(options: dict[str, object], tmp_path: Path) -> None:
    graph, script = tmp_path / "graph", tmp_path / "script.py"
    config = GenerateConfig(num_nodes=400, num_features=8, num_classes=3, avg_degree=4, train=0.5)
    generate_graph(graph, config, host_memory=64 * MIB)
    script.write_text(_SCRIPT)
    command = [sys.executable, str(script), str(graph), str(tmp_path / "run"), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the script begins") == 1
    assert int(done.stdout) > 0  # and no process of ours adds a line
