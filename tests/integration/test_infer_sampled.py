"""`infer --sampled` writes what `evaluate.mode=sampled` scores, for any model, within its budgets."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import penstock

MODULE = """
import torch
from penstock.engine.aggregate import aggregate_mean

class Whole(torch.nn.Module):
    '''What it computes at the end depends on its input: layer by layer it cannot go.'''
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.near, self.far = torch.nn.Linear(num_features, 8), torch.nn.Linear(num_features, 8)
        self.head = torch.nn.Linear(16, num_classes)
    def hidden(self, blocks, x):
        far = self.far(aggregate_mean(blocks[-1], aggregate_mean(blocks[0], x)))
        return torch.cat([self.near(x[: blocks[-1].num_dst]), far], dim=1).relu()
    def forward(self, blocks, x):
        return self.head(self.hidden(blocks, x))

class Embeds(Whole):
    def embed(self, blocks, x):
        return self.hidden(blocks, x)
"""
SAMPLED: dict[str, Any] = {
    "sampler.batch_size": 64,
    "sampler.fanouts": (3, 4),
    "budgets.host_memory": "64MiB",
    "train.epochs": 2,
    "train.threads": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "layers": {"model.hidden": 8},
    "whole": {"model.kind": "custom", "model.module": "sampled_modules:Whole"},
    "embeds": {"model.kind": "custom", "model.module": "sampled_modules:Embeds"},
}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> penstock.GraphStore:
    path = tmp_path_factory.mktemp("sampled") / "graph"
    config = penstock.GenerateConfig(
        num_nodes=2000, num_features=64, num_classes=3, avg_degree=5, train=0.4, valid=0.2, test=0.3
    )
    return penstock.generate_graph(path, config, host_memory=64 << 20)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "sampled_modules.py").write_text(MODULE)
    return folder


def train(graph: penstock.GraphStore, run: Path, kind: str, **options: Any) -> dict[str, Any]:
    flags = {**SAMPLED, **KINDS[kind], "dataset": graph.path, "run_dir": run, **options}
    return penstock.train(penstock.load_config(flags=flags))


def column(path: Path, name: str) -> Any:
    return np.array(pq.read_table(path).column(name).to_pylist())


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        pytest.param("layers", ["id", "embedding", "logits", "prediction"], marks=pytest.mark.slow),
        ("whole", ["id", "logits", "prediction"]),
        pytest.param("embeds", ["id", "embedding", "logits", "prediction"], marks=pytest.mark.slow),
    ],
)
def test_it_writes_what_evaluation_scores(
    kind: str,
    columns: list[str],
    graph: penstock.GraphStore,
    modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(modules)
    run = tmp_path / "run"
    metrics = train(graph, run, kind)["metrics"]
    for split in ("valid", "test"):
        out = tmp_path / f"{split}.parquet"
        found = penstock.infer(run, out, split=split, sampled=True, host_memory="16MiB", threads=1)
        assert found["columns"] == columns and found["fanouts"] == [3, 4]
        ids = graph.split_ids(split)
        assert column(out, "id").tolist() == ids.tolist()
        right = column(out, "prediction") == graph.labels[ids]
        assert right.mean() == metrics[f"{split}_accuracy"]
    assert not (run / "sampled" / "test").exists()


@pytest.fixture(scope="module")
def trained(graph: penstock.GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trained") / "run"
    train(graph, run, "layers")
    return run


def test_with_all_neighbours_it_equals_exact_outputs(trained: Path, tmp_path: Path) -> None:
    sampled, exact = tmp_path / "sampled.parquet", tmp_path / "exact.parquet"
    penstock.infer(trained, sampled, sampled=True, fanouts=(-1, -1), host_memory="64MiB")
    found = penstock.infer(trained, exact, host_memory="64MiB")
    assert found["rows"] == 2000 and found["fanouts"] == "all neighbours"
    for name in ("embedding", "logits"):
        np.testing.assert_allclose(column(sampled, name), column(exact, name), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_budgets_change_nothing(trained: Path, graph: penstock.GraphStore, tmp_path: Path) -> None:
    """Windows that roll through a disk that holds a part of them, and a host tier smaller than the features."""
    small, large = tmp_path / "small.parquet", tmp_path / "large.parquet"
    stages = set()

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        stages.add(stage)

    assert graph.feature_bytes > 500_000
    penstock.infer(trained, small, sampled=True, host_memory="3MiB", disk="700KiB", progress=progress)
    assert stages == {"infer"}  # nothing was sampled or packed ahead
    penstock.infer(trained, large, sampled=True, host_memory="64MiB", progress=progress)
    assert stages == {"sample", "plan", "pack", "infer"}
    assert small.read_bytes() == large.read_bytes()


def test_what_has_no_effect_or_does_not_fit_the_model_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fanouts and disk are for sampled=True"):
        penstock.infer(trained, tmp_path / "no", fanouts=(2, 2))
    with pytest.raises(ValueError, match=r"fanouts=\[2\] are for 1 layers, the model has 2"):
        penstock.infer(trained, tmp_path / "no", sampled=True, fanouts=(2,))
    assert not (tmp_path / "no").exists()


def test_a_model_that_cannot_go_layer_by_layer_is_told_when_training_starts(
    graph: penstock.GraphStore,
    modules: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.syspath_prepend(modules)
    with caplog.at_level(logging.WARNING):
        train(graph, tmp_path / "run", "whole", **{"train.epochs": 1})
    assert "Whole has no `layers`" in caplog.text and "penstock infer --sampled" in caplog.text
    with pytest.raises(ValueError, match=r"has no `layers`.*infer --sampled"):
        penstock.infer(tmp_path / "run", tmp_path / "out.parquet", host_memory="64MiB")
    with pytest.raises(ValueError, match=r"has no `layers`.*evaluate\.mode=sampled"):
        train(graph, tmp_path / "exact", "whole", **{"evaluate.mode": "exact"})


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["penstock", "python -m penstock"])
def test_commands_find_modules_in_their_folder_and_export_them(
    entry: str, graph: penstock.GraphStore, modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    script = [str(Path(sys.executable).parent / "penstock")]
    first = script if entry == "penstock" else [sys.executable, "-m", "penstock"]
    model = ["--set", "model.kind=custom", "--set", "model.module=sampled_modules:Embeds"]
    size = ["--fanouts", "2,2", "--epochs", "1", "--quiet"]
    for command in (
        ["train", graph.path, "--run-dir", tmp_path / "run", *size, *model],
        ["infer", tmp_path / "run", tmp_path / "out.parquet", "--sampled", "--fanouts", "3,-1", "--disk", "1GiB"],
    ):
        done = subprocess.run([*first, *map(str, command)], cwd=modules, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert column(tmp_path / "out.parquet", "embedding").shape == (2000, 16)


MEASURED = """
import sys
import penstock
from penstock.storage.budget import peak_rss_bytes
penstock.infer(sys.argv[1], sys.argv[2], sampled=True, host_memory="24MiB", threads=1)
print(peak_rss_bytes())
"""


@pytest.mark.slow
def test_features_larger_than_the_memory_given_do_not_come_into_memory(tmp_path: Path) -> None:
    peaks = []
    for num_nodes in (2_000, 100_000):
        config = penstock.GenerateConfig(num_nodes=num_nodes, num_features=256, avg_degree=5, train=0.01)
        graph = penstock.generate_graph(tmp_path / f"{num_nodes}.graph", config)
        run = tmp_path / str(num_nodes)
        train(graph, run, "layers", **{"train.epochs": 1, "evaluate.mode": "none"})
        command = [sys.executable, "-c", MEASURED, str(run), str(tmp_path / "out.parquet")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert graph.feature_bytes > 96 << 20
    assert (
        peaks[1] - peaks[0] < 48 << 20
    )  # topology, original ids and buffers of 24 MiB, which the small graph does not fill
