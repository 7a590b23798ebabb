"""Waiting for room in a cluster: whoever asks a run to stop meanwhile is heard at once."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from patience import allowed_s

from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = ["--hidden", "8", "--epochs", "1", "--host-memory", "64MiB", "--threads", "1", "--ray", "local", "--quiet"]


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("waiting") / "graph"
    generate_graph(out, GenerateConfig(num_nodes=400, num_features=8, train=0.5), host_memory=16 * MIB)
    return out


@pytest.mark.parametrize(
    ("words", "news"),
    [
        (["--replicas", "2", "--set", "cluster.replica_resources={ssd: 1}"], "waiting for room for 2 ranks"),
        (
            ["--mode", "chunked", "--chunks", "2", "--stages", "2", "--set", "cluster.replica_resources={ssd: 1}"],
            "waiting for room for 2 ranks",
        ),
        (["--replicas", "1", "--feeders", "1", "--set", "cluster.feeder_resources={ssd: 1}"], "waiting for a feeder"),
    ],
    ids=["replicas", "full graph", "feeders"],
)
def test_sigterm_ends_a_wait_for_room_with_a_code_to_run_again(
    graph: Path, tmp_path: Path, words: list[str], news: str
) -> None:
    """`cluster.wait_s` is as it comes: ten minutes."""
    command = [sys.executable, "-m", "penstock", "train", str(graph), "--run-dir", str(tmp_path / "run"), *SMALL]
    sizes = [] if "chunked" in words else ["--fanouts", "3,3", "--batch-size", "64"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen([*command, *sizes, *words], stderr=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stderr is not None
        seen = []
        for line in driver.stderr:
            seen.append(line)
            if news in line:
                break
        else:
            pytest.fail("".join(seen)[-3000:])
        driver.send_signal(signal.SIGTERM)
        try:
            _, rest = driver.communicate(timeout=allowed_s(30))
        except subprocess.TimeoutExpired:
            driver.kill()
            raise
    assert driver.returncode == 75, rest
    assert "stopped while waiting; run the same command again to continue" in rest
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"
