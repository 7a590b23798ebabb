"""Every command of README and docs, in the order in which they stand, in one folder; README is read first."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.documents.blocks import ROOT, blocks_of, commands_of

Shell = Callable[[str], str]

# What the sentences around a command leave to the reader, by what stands in it.
ELSEWHERE = {
    r"\bpip install\b": "installs what runs this test; `.ci/run` and a fresh environment show it",
    r"\bray (start|get-auth-token)\b|--ray\b|^penstock submit\b": "needs a Ray cluster: tests/cluster",
    r"\bdocker\b": "needs a Docker engine; tests/deploy reads the Dockerfile",
}
# Names that stand for something of the reader's, and what they are here.
_NAMES = {"s3://bucket": "file://{folder}/bucket", "/local/nvme": "{folder}/nvme", "/tmp/quick": "{folder}/quick"}
_MODULE = """
import torch

class MyModel(torch.nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(num_features, num_classes)

    def forward(self, blocks, x):
        return self.linear(x[: blocks[-1].num_dst])
"""


def here(command: str) -> bool:
    """Whether this test can run a command."""
    return not any(re.search(pattern, command) for pattern in ELSEWHERE)


def write_tables(folder: Path, num_nodes: int = 1200) -> None:
    """Nodes of four classes that cite their own, with features that say little, as README describes tables."""
    rng = np.random.default_rng(3)
    label = rng.integers(0, 4, num_nodes)
    feature = (rng.normal(size=(num_nodes, 16)) + 0.5 * np.eye(4, 16)[label]).astype(np.float32)
    order = np.argsort(label, kind="stable")
    place = np.argsort(order)
    src = rng.integers(0, num_nodes, 6 * num_nodes)
    near = np.clip(place[src] + rng.integers(-40, 41, len(src)), 0, num_nodes - 1)
    split = rng.choice(["train", "valid", "test"], num_nodes, p=[0.5, 0.2, 0.3])
    folder.mkdir()
    columns = {"id": np.arange(num_nodes), "feature": list(feature), "label": label, "split": split}
    pq.write_table(pa.table(columns), folder / "nodes.parquet")
    pq.write_table(pa.table({"src": src, "dst": order[near]}), folder / "edges.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all documents are followed, with what a reader brings."""
    made = tmp_path_factory.mktemp("reader")
    write_tables(made / "tables")
    (made / "my_package").mkdir()
    (made / "my_package" / "my_module.py").write_text(_MODULE)
    (made / "run.yaml").write_text((ROOT / "deploy" / "run.yaml").read_text())
    return made


@pytest.fixture(scope="module")
def shell(folder: Path) -> Shell:
    """A function that runs a command in the folder and returns what it printed; fails where the command does."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}

    def run(command: str) -> str:
        for name, place in _NAMES.items():
            command = command.replace(name, place.format(folder=folder))
        command = command.removesuffix("| kubectl apply -f -")
        words = ["bash", "-c", f"set -eu; {command}"]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\nexit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    return run


def test_the_main_job_of_the_readme(shell: Shell, folder: Path) -> None:
    """Ingest, plan, train, infer, and then the same in Python, which finds the run done."""
    commands = [command for command in commands_of("README.md") if "runs/papers" in command or "ingest" in command]
    assert [command.split()[1] for command in commands] == ["ingest", "plan", "train", "infer"]
    for command in commands:
        shell(command)
    (folder / "job.py").write_text(blocks_of("README.md", "python")[0])
    assert float(shell("python job.py").split()[-1]) > 0.6
    assert pq.read_metadata(folder / "papers.parquet").num_rows == 1200


@pytest.mark.slow
@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_commands_of_a_document(shell: Shell, document: str) -> None:
    """In one folder, one document after the other: those after README go on with what it left."""
    for command in filter(here, commands_of(document)):
        shell(command)


def test_no_command_is_left_out_without_a_reason() -> None:
    """What is not run here exists, so that the list of reasons stays true."""
    commands = [command for path in ("README.md", "docs/deploy.md", "docs/cluster.md") for command in commands_of(path)]
    for pattern in ELSEWHERE:
        assert any(re.search(pattern, command) for command in commands), pattern
    assert sum(map(here, commands_of("README.md"))) >= 6
