"""Ray's head is lost under a program that embeds Penstock, and under the command line: neither is ended by it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from patience import allowed_s, wait_until
from ray.cluster_utils import Cluster

from penstock.storage.generate import GenerateConfig, generate_graph

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# What another program does around `train`; Ray would end it a minute after the head was lost.
PROGRAM = """
import atexit, json, signal, sys, time
from pathlib import Path
import penstock

atexit.register(print, "atexit ran", flush=True)
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
flags = json.loads(sys.argv[1])
try:
    penstock.train(penstock.load_config(flags=flags))
except Exception as error:
    print("caught", type(error).__name__, error, flush=True)
finally:
    print("finally ran", flush=True)
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
time.sleep(75)
print("went on", flush=True)
"""


@pytest.fixture
def cluster() -> Iterator[Any]:
    found: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    yield found
    found.shutdown()


def kill_head(cluster: Any) -> None:
    for processes in cluster.head_node.all_processes.values():
        for found in processes:
            found.process.kill()


def ended(processes: list["subprocess.Popen[str]"]) -> bool:
    return any(process.poll() is not None for process in processes)


def test_a_program_that_lost_its_head_gets_an_error_and_goes_on(cluster: Any, tmp_path: Path) -> None:
    graph = tmp_path / "graph"
    generate_graph(graph, GenerateConfig(num_nodes=2000, num_features=8), host_memory=32 << 20)
    options: dict[str, Any] = {
        "dataset": str(graph),
        "cluster.address": cluster.address,
        "train.epochs": 100000,
        "train.threads": 1,
        "train.checkpoint_items": 10,
        "sampler.fanouts": [3, 3],
        "sampler.batch_size": 64,
        "model.hidden": 8,
        "budgets.host_memory": "32MiB",
        "budgets.disk": "64MiB",
        "evaluate.mode": "none",
    }
    (tmp_path / "program.py").write_text(PROGRAM)
    own = {"run_dir": str(tmp_path / "embedded"), **options}
    program = [sys.executable, "-P", "program.py", json.dumps(own)]
    verb = [sys.executable, "-P", "-m", "penstock", "train", "--run-dir", str(tmp_path / "verb"), "--quiet"]
    verb += [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    started = [
        subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for words in (program, verb)
    ]
    runs = [tmp_path / "embedded", tmp_path / "verb"]
    try:
        wait_until(lambda: ended(started) or all(list(run.glob("checkpoints/step-*")) for run in runs), 120)
        kill_head(cluster)
        (said, warned), (_, told) = [process.communicate(timeout=allowed_s(300)) for process in started]
    finally:
        for process in started:
            process.kill()
    lines = [line for line in said.splitlines() if line.startswith(("caught", "finally", "went", "atexit"))]
    assert [line.split()[0] for line in lines] == ["caught", "finally", "went", "atexit"], said + warned
    assert lines[0].startswith(f"caught HeadLost Ray's head at {cluster.address} has not answered for")
    assert started[0].returncode == 0, warned
    assert started[1].returncode == 75 and "run the same command again" in told, told
    for run in runs:
        result = json.loads((run / "result.json").read_text())
        assert (result["status"], result["error"]["type"], result["error"]["exit_code"]) == ("failed", "HeadLost", 75)
        assert (run / ".lock").read_text() == ""  # released in good order
