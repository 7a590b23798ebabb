"""Three newcomers, with what README, docs and `--help` say: every command as they would type it, once, in order."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from tests.documents.blocks import ROOT, blocks_of
from tests.documents.test_commands import Shell, open_shell

NUM_NODES = 4000

_PYG_DATA = """
import torch
import penstock
from torch_geometric.data import Data

torch.manual_seed(0)
num_nodes = 4000
y = torch.arange(num_nodes) * 4 // num_nodes
x = torch.randn(num_nodes, 32)
x[torch.arange(num_nodes), y] += 1
src = torch.arange(num_nodes).repeat(8)
dst = (src + torch.randint(-100, 101, src.shape)).clamp(0, num_nodes - 1)
draw = torch.rand(num_nodes)
data = Data(x=x, y=y, edge_index=torch.stack([src, dst]))
data.train_mask, data.val_mask, data.test_mask = draw < 0.6, (draw >= 0.6) & (draw < 0.8), draw >= 0.8
print(penstock.ingest_pyg(data, "papers.graph"))
"""


@pytest.mark.slow
def test_a_student_with_layers_of_pyg(tmp_path: Path) -> None:
    """A `Data` object becomes a graph store; a module of PyG's layers is trained out of core, scored and exported."""
    pytest.importorskip("torch_geometric")
    shell = open_shell(tmp_path)
    (tmp_path / "make.py").write_text(_PYG_DATA)
    assert "4,000 nodes" in shell("python make.py")
    shell(
        "cd examples && penstock train ../papers.graph --run-dir ../runs/papers --fanouts 5,10 --epochs 10 "
        "--host-memory 64MiB --set train.lr=0.01 --set model.kind=custom --set model.module=pyg_layers:PygNet"
    )
    result = json.loads((tmp_path / "runs" / "papers" / "result.json").read_text())
    assert result["metrics"]["test_accuracy"] > 0.6
    shell("cd examples && penstock infer ../runs/papers ../papers.parquet")
    assert pq.read_schema(tmp_path / "papers.parquet").names == ["id", "embedding", "logits", "prediction"]
    (tmp_path / "export.py").write_text(blocks_of("docs/models.md", "python")[0])
    shell("PYTHONPATH=$PWD/examples:${PYTHONPATH:-} python export.py")
    assert (tmp_path / "weights.pt").stat().st_size > 0


def write_accounts(folder: Path) -> None:
    """Tables of a warehouse: partitions by day, ids and labels that are strings, a split column of another name."""
    rng = np.random.default_rng(0)
    fraud = np.arange(NUM_NODES) % 2 == 0
    ids = np.array([f"acct-{number:06d}" for number in rng.permutation(NUM_NODES)])
    day = np.where(rng.random(NUM_NODES) < 0.5, "mon", "tue")
    features = {f"f_{n}": (rng.normal(size=NUM_NODES) + 0.4 * fraud).astype(np.float32) for n in range(8)}
    part = rng.choice(["train", "validation", "test"], NUM_NODES, p=[0.6, 0.2, 0.2])
    nodes = {"account": ids, **features, "status": np.where(fraud, "fraud", "legit"), "part": part, "day": day}
    src = rng.integers(0, NUM_NODES, 8 * NUM_NODES)
    dst = (src + 2 * rng.integers(0, 200, len(src))) % NUM_NODES
    edges = {"src": ids[src], "dst": ids[dst], "amount": rng.random(len(src), np.float32), "day": day[src]}
    for name, columns in {"nodes": nodes, "edges": edges}.items():
        by_day = ds.partitioning(pa.schema([("day", pa.string())]), flavor="hive")
        ds.write_dataset(pa.table(columns), folder / name, format="parquet", partitioning=by_day)


_TRAIN = (
    "penstock train accounts.graph --run-dir runs/accounts --fanouts 5,10 --host-memory 64MiB --epochs 60 --threads 1"
)
_KILL = f"""
{_TRAIN} --replicas 2 &
until ls runs/accounts/checkpoints/step-*/state.json; do kill -0 $!; sleep 0.1; done > /dev/null 2>&1
kill -9 $!
wait $! || true
"""


@pytest.mark.slow
def test_a_platform_engineer_with_a_warehouse_and_ray(tmp_path: Path) -> None:
    """Partitioned tables, two replicas that are killed and go on as actors of Ray, predictions, another experiment."""
    pytest.importorskip("ray")
    shell = open_shell(tmp_path)
    write_accounts(tmp_path / "warehouse")
    ingest = (
        "penstock ingest warehouse accounts.graph --nodes warehouse/nodes --edges warehouse/edges "
        "--set undirected=true --set id_column=account --set feature_prefix=f_ --set label_column=status "
        "--set split_column=part"
    )
    assert "2 (strings, which infer writes)" in shell(ingest)
    shell(ingest)
    assert "host memory needed" in shell(
        "penstock plan accounts.graph --run-dir runs/accounts --fanouts 5,10 --host-memory 64MiB --threads 1"
    )
    shell(_KILL)
    assert "run the same command again to continue" in shell("penstock inspect runs/accounts")
    shell(f"{_TRAIN} --replicas 2 --ray local")
    assert "already done" in shell(f"{_TRAIN} --replicas 2 --ray local")
    shell("penstock infer runs/accounts out.parquet")
    scored = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert len(set(scored["id"])) == NUM_NODES and scored["id"][0].startswith("acct-")
    assert set(scored["prediction"]) == {"fraud", "legit"}
    shell(f"{_TRAIN} --replicas 2 --lr 0.01 --experiment fast")
    assert "fast" in shell("penstock inspect runs/accounts").split("experiments of")[1]
    for run in ("runs/accounts", "runs/accounts/experiments/fast"):
        result = json.loads((tmp_path / run / "result.json").read_text())
        assert result["status"] == "ok" and result["metrics"]["test_accuracy"] > 0.8
        assert "<html" in (tmp_path / run / "report.html").read_text().lower()


def read_per_epoch(shell: Shell, policy: str) -> int:
    """Bytes that the feed would read per epoch under a policy of the host tier, as `plan` writes it down."""
    shell(
        f"penstock plan demo.graph --run-dir runs/{policy} --fanouts 5,10 --batch-size 64 --host-memory 12MiB "
        f"--policy {policy}"
    )
    found = json.loads(shell(f"cat runs/{policy}/train/plan.json"))
    return int(found["read_bytes_per_epoch"])


def command_of_example(name: str) -> str:
    """The command in the docstring of an example, on this reader's graph."""
    (found,) = re.findall(r"^ +(penstock (?:.*\\\n)*.*)$", (ROOT / "examples" / f"{name}.py").read_text(), re.MULTILINE)
    return str(found).replace("\\\n", "").replace("DATASET", "../demo.graph")


@pytest.mark.slow
def test_a_researcher_who_measures_first(tmp_path: Path) -> None:
    """Benches at a small scale, policies compared, a model of her own, and the whole graph in chunks."""
    shell = open_shell(tmp_path)
    assert "static_tier_0.1" in shell("penstock bench policies --scale 0.002 --repeats 1")
    items = pa.table({"item": np.repeat(np.arange(50), 40), "row": np.random.default_rng(0).integers(0, 500, 2000)})
    pq.write_table(items, tmp_path / "accesses.parquet")
    printed = shell("penstock bench policies --trace accesses.parquet --tiers 0.1 --json")
    assert json.loads(printed.splitlines()[0])["tier_share"] == 0.1
    shell("penstock generate demo.graph --num-nodes 4000 --set num_features=32")
    belady, static, none = (read_per_epoch(shell, policy) for policy in ("belady", "static", "none"))
    assert belady <= static < none
    for example in ("custom_module", "deep_custom_model"):
        shell(f"cd examples && {command_of_example(example)} --epochs 2".replace("RUN", f"../runs/{example}"))
    shell("cd examples && penstock infer ../runs/custom_module ../own.parquet")
    deep = "demo.graph --run-dir runs/deep --mode chunked --chunks 4 --model gcnii --layers 4"
    shell(f"penstock plan {deep}")
    shell(f"penstock train {deep} --stages 2 --epochs 3")
    assert "alpha" in shell("penstock inspect runs/deep/chunks/4x1")
    shell("penstock infer runs/deep deep.parquet")
    assert pq.read_metadata(tmp_path / "deep.parquet").num_rows == 4000
