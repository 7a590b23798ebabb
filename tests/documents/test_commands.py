"""Every command of README and docs, in the order in which they stand, in one folder; README is read first."""

import os
import re
import shutil
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
NUM_NODES = 2600

# What the sentences around a command leave to the reader, by what stands in it.
ELSEWHERE = {
    r"\bpip install\b": "installs what runs this test; `.ci/run` and a fresh environment show it",
    r"\bray (start|get-auth-token)\b|--ray\b|^penstock submit\b": "needs a Ray cluster: tests/cluster",
    r"\bdocker\b": "needs a Docker engine; tests/deploy reads the Dockerfile",
}
# Names that stand for something of the reader's, and what they are here; depth costs time and changes no command.
_NAMES = {
    "s3://bucket": "file://{folder}/bucket",
    "/local/nvme": "{folder}/nvme",
    "/tmp/": "{folder}/tmp/",
    "--layers 32": "--layers 4",
}
_MODULE = """
import torch

class Layer(torch.nn.Linear):
    def forward(self, block, x):
        return super().forward(x[: block.num_dst])

class MyModel(torch.nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(num_features, 16), Layer(16, num_classes)])

    def forward(self, blocks, x):
        for layer, block in zip(self.layers, blocks, strict=True):
            x = layer(block, x)
        return x
"""


def here(command: str) -> bool:
    """Whether this test can run a command."""
    return not any(re.search(pattern, command) for pattern in ELSEWHERE)


def write_tables(folder: Path, num_nodes: int = NUM_NODES) -> None:
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


def open_shell(folder: Path) -> Shell:
    """Make a reader's folder, and a function that runs commands there and returns what they printed.

    It fails where a command does.
    """
    write_tables(folder / "tables")
    for name in ("my_package", "tmp"):
        (folder / name).mkdir()
    (folder / "my_package" / "my_module.py").write_text(_MODULE)
    (folder / "run.yaml").write_text((ROOT / "deploy" / "run.yaml").read_text())
    shutil.copytree(ROOT / "examples", folder / "examples")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONSAFEPATH": "1"}

    def run(command: str) -> str:
        for name, place in _NAMES.items():
            command = command.replace(name, place.format(folder=folder))
        command = command.replace("| kubectl apply -f -", "")
        words = ["bash", "-c", f"set -eu\n{command}"]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\nexit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Where all documents are followed."""
    return open_shell(tmp_path_factory.mktemp("reader"))


def all_commands(document: str) -> list[str]:
    """Every command of a document in order."""
    return [command for block in blocks_of(document, "bash") for command in commands_of(block)]


def test_the_main_job_of_the_readme(tmp_path: Path) -> None:
    """Ingest, plan, train, infer, and then the same in Python, which finds the run done."""
    shell = open_shell(tmp_path)
    commands = commands_of(next(block for block in blocks_of("README.md", "bash") if "penstock ingest" in block))
    assert [command.split()[1] for command in commands] == ["ingest", "plan", "train", "infer"]
    for command in commands:
        shell(command)
    (tmp_path / "job.py").write_text(blocks_of("README.md", "python")[0])
    assert float(shell("python job.py").split()[-1]) > 0.6
    assert pq.read_metadata(tmp_path / "papers.parquet").num_rows == NUM_NODES


DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.slow
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks_of(document, "bash")])
def test_commands_of_a_document(shell: Shell, document: str) -> None:
    """In one folder, one document after the other: those after README go on with what it left."""
    for block in blocks_of(document, "bash"):
        shell("\n".join(filter(here, commands_of(block))))


def test_no_command_is_left_out_without_a_reason() -> None:
    """What is not run here exists, so that the list of reasons stays true."""
    commands = [command for document in DOCUMENTS for command in all_commands(document)]
    for pattern in ELSEWHERE:
        assert any(re.search(pattern, command) for command in commands), pattern
    assert sum(map(here, all_commands("README.md"))) >= 6
