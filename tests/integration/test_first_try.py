"""What a first try gets wrong is said before any work, leaves nothing that binds, and the remedy works."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.__main__ import main
from penstock.config import load_config
from penstock.report import copy_result
from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train

PLAIN = ["--fanouts", "4,4", "--batch-size", "64", "--epochs", "1", "--threads", "1", "--quiet"]
SHAPE = [*PLAIN, "--hidden", "8"]
MODULES = """
import torch
from penstock.engine.aggregate import aggregate_mean

class Good(torch.nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(num_features, 8), Layer(8, num_classes)])
    def forward(self, blocks, x):
        for layer, block in zip(self.layers, blocks):
            x = layer(block, x)
        return x

class Layer(torch.nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.linear = torch.nn.Linear(width, out)
    def forward(self, block, x):
        return self.linear(aggregate_mean(block, x))

class Late(Good):
    def forward(self, blocks, x):
        if len(x) > 2:
            raise ValueError("a check of mine")
        return super().forward(blocks, x)

class Torch(Good):
    def forward(self, blocks, x):
        if len(x) > 2:  # torch refuses with a ValueError
            torch.nn.functional.cross_entropy(x, torch.zeros(1, dtype=torch.long))
        return super().forward(blocks, x)

class Pyg(torch.nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.linear = torch.nn.Linear(num_features, num_classes)
    def forward(self, x, edge_index):
        return self.linear(x)
"""


def penstock(*words: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock", *map(str, words)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False, cwd=cwd)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "graph"
    config = GenerateConfig(num_nodes=4000, num_features=32, avg_degree=8, train=0.1, valid=0.05, test=0.05)
    generate_graph(out, config, host_memory=32 * MIB)
    return out


def custom(name: str) -> list[str]:
    return ["--set", "model.kind=custom", "--set", f"model.module=mine:{name}"]


@pytest.mark.slow
def test_a_module_is_found_in_the_folder_of_the_command_and_its_errors_are_its_own(graph: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODULES)
    for name, code, said in (
        ("Goode", 2, "it has Good"),
        ("Pyg", 2, "forward(blocks, x)"),
        ("Late", 1, "a check of mine"),
        ("Torch", 1, "Expected input batch_size"),
    ):
        done = penstock(
            "train", graph, "--run-dir", tmp_path / "run", *PLAIN, "--host-memory", "24MiB", *custom(name), cwd=tmp_path
        )
        assert done.returncode == code and said in done.stderr, done.stderr
        assert ("Traceback" in done.stderr) == (code == 1)
    done = penstock(
        "train", graph, "--run-dir", tmp_path / "run", *PLAIN, "--host-memory", "24MiB", *custom("Good"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    done = penstock("infer", tmp_path / "run", tmp_path / "out.parquet", "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["nosuch://x/result.json", "{tmp}", "{tmp}/file/result.json"])
def test_where_the_result_cannot_be_written_is_said_at_once(graph: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("no folder")
    target = target.format(tmp=tmp_path)
    config = load_config(flags={"dataset": graph, "run_dir": tmp_path / "run"})
    with pytest.raises(ValueError, match=re.escape(target.removesuffix("/result.json"))):
        train(config, result_json=target)
    assert not (tmp_path / "run").exists()


def test_a_result_that_cannot_be_copied_in_the_end_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "file").write_text("no folder")
    copy_result(tmp_path / "result.json", tmp_path / "file" / "result.json")
    assert "could not be copied" in caplog.text


VERBS = {
    "pack": ["pack", "{graph}", "--run-dir", "{tmp}/run", *SHAPE],
    "train": ["train", "{graph}", "--run-dir", "{tmp}/run", *SHAPE],
    "exact": ["train", "{graph}", "--run-dir", "{tmp}/run", *SHAPE, "--set", "evaluate.mode=exact"],
    "int8": ["train", "{graph}", "--run-dir", "{tmp}/run", *SHAPE, "--set", "plan.row_dtype=int8"],
    "chunked": [
        *("train", "{graph}", "--run-dir", "{tmp}/run", "--mode", "chunked", "--chunks", "4", "--layers", "2"),
        *("--epochs", "1", "--hidden", "8", "--quiet"),
    ],
    "generate": ["generate", "{tmp}/made", "--num-nodes", "5000", "--quiet"],
}
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def call(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """A function that runs a verb in this process; returns its exit code and what it said."""

    def called(verb: str, *words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*(word.format(graph=graph, tmp=tmp_path) for word in VERBS[verb]), *words])
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.err + said.out

    return called


@pytest.mark.parametrize("size", ["0", "0.5", "-4GiB", "1e9", "many", "9000000000000TiB"])
@pytest.mark.parametrize("flag", ["--host-memory", "--disk"])
@pytest.mark.parametrize("verb", ["train", "generate"])
def test_absurd_sizes_are_refused_with_a_message(call: Call, verb: str, flag: str, size: str) -> None:
    if verb == "generate" and flag == "--disk":
        return
    code, said = call(verb, f"{flag}={size}")
    assert code in (2, 4) and "Traceback" not in said, said


@pytest.mark.parametrize("verb", VERBS)
def test_the_host_memory_that_is_named_suffices(call: Call, verb: str) -> None:
    code, said = call(verb, "--host-memory", "1000")
    found = re.search(r"use --host-memory (\d+) or more", said)
    assert code == 4 and found is not None, said
    code, said = call(verb, "--host-memory", found[1])
    assert code == 0, said


@pytest.mark.parametrize("verb", ["train", "int8"])
def test_the_disk_that_is_named_suffices(call: Call, verb: str) -> None:
    code, said = call(verb, "--host-memory", "8MiB", "--disk", "64KiB")
    found = re.search(r"use --disk (\d+) or more", said)
    assert code == 4 and found is not None, said
    code, said = call(verb, "--host-memory", "8MiB", "--disk", found[1])
    assert code == 0, said
