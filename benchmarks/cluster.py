"""`penstock bench cluster`: replicas against one, our sums against torch's, and what feeders cost the trainer.

| case | ours | peer |
|---|---|---|
| `two_replicas` | two replicas, a process and thread each | one replica with the same items per optimizer step |
| `sum_vs_all_reduce` | gradients summed pairwise, in the items' order | `torch.distributed.all_reduce` |
| `sum_vs_ddp` | forward and backward of a step with that sum | the same under `DistributedDataParallel` |
| `feeder_stall` | seconds that the trainer waits for windows of feeders | seconds of the epoch |
| `feeder_disk` | high-water mark of disk, feeder and trainer | their budgets |

Ranks of both sides are open all the time and wait while the other side works. Losses of `two_replicas` are compared:
the sides must have trained on the same items, to the same bits.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from penstock.benchmarks.cluster_sides import OPEN_REDUCER, FedSide, ReducerSpec, ReplicaSide
from penstock.benchmarks.harness import interleave, open_bench_graph, record
from penstock.config import load_config
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.processes import open_processes
from penstock.storage.generate import GenerateConfig
from penstock.storage.graph import GraphStore

NUM_NODES, NUM_FEATURES, NUM_ITEMS, BATCH_SIZE = 500_000, 128, 48, 256
FANOUTS, HIDDEN = (10, 10, 10), 256
_WARM_ITEMS, _TURN_ITEMS = 8, 24
_SUM_FLOATS = 1 << 20  # of a gradient: SAGE with three layers of 256 has half as many


def _graph(folder: Path, scale: float) -> GraphStore:
    num_nodes, batch_size = int(NUM_NODES * scale), _batch_size(scale)
    train = min(0.9, NUM_ITEMS * batch_size / num_nodes)
    return open_bench_graph(folder, GenerateConfig(num_nodes=num_nodes, num_features=NUM_FEATURES, train=train))


def _batch_size(scale: float) -> int:
    return max(16, int(BATCH_SIZE * min(1.0, scale)))


def _flags(graph: GraphStore, run_dir: Path, scale: float, replicas: int) -> dict[str, Any]:
    return {
        "dataset": str(graph.path),
        "run_dir": str(run_dir),
        "sampler.fanouts": FANOUTS,
        "sampler.batch_size": _batch_size(scale),
        "model.hidden": HIDDEN,
        "train.accumulate": 2,
        "train.threads": 1,
        "train.epochs": 1000,  # both sides take items for as long as they are asked
        "evaluate.mode": "none",
        "budgets.host_memory": "1GiB",
        "budgets.disk": "40GiB",
        "cluster.replicas": replicas,
    }


def two_replicas(graph: GraphStore, folder: Path, scale: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield items per second of two replicas over those of one; higher is better."""
    configs = [load_config(flags=_flags(graph, folder / f"replicas-{n}", scale, n)) for n in (2, 1)]
    with ReplicaSide(configs[0]) as ours, ReplicaSide(configs[1]) as peer:
        for side in (ours, peer):
            side.advance(_WARM_ITEMS)
        values = interleave(lambda: ours.advance(_TURN_ITEMS), lambda: peer.advance(_TURN_ITEMS), repeats)
        apart = max(abs(a - b) for a, b in zip(ours.losses, peer.losses, strict=True))
        equal = ours.checksum() == peer.checksum()
        facts = {
            "target": 1.6,
            "largest_loss_difference": apart,
            "same_weights": equal,
            "reduce_share": ours.reduce_share,
        }
    found = record("cluster", "two_replicas", "items/s", *values, "one replica, accumulating", True, repeats)
    if apart > 1e-6:
        raise RuntimeError(f"losses of two replicas and of one differ by {apart}, more than 1e-6")
    yield {**found, **facts}


def sums(folder: Path, scale: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the time of a step's sum over two ranks over that of torch's own; lower is better."""
    floats = max(1024, int(_SUM_FLOATS * scale))
    specs = [ReducerSpec(rank=rank, layout=Layout(1, 2), scratch=folder / "sums") for rank in range(2)]
    with partial(open_processes, open_rank=OPEN_REDUCER)(specs) as backend:

        def measure(method: str) -> float:
            began = perf_counter()
            backend.call(method, [(floats, 20)] * 2)
            return (perf_counter() - began) / 20

        for case, ours, peer, name in (
            ("sum_vs_all_reduce", "sum", "all_reduce", "torch.distributed.all_reduce, gloo"),
            ("sum_vs_ddp", "step", "ddp_step", "torch DistributedDataParallel, gloo"),
        ):
            values = interleave(partial(measure, ours), partial(measure, peer), repeats)
            yield {**record("cluster", case, "s/step", *values, name, False, repeats), "floats": floats}


def feeder_stall(graph: GraphStore, folder: Path, scale: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield the share of an epoch that a trainer waits for its feeder, and what both have on disk; lower is better."""
    flags = _flags(graph, folder / "fed", scale, 1) | {
        "train.accumulate": 1,
        "budgets.disk": "1GiB",
        "cluster.address": "auto",  # until the side has started a cluster of its own
        "cluster.feeders": 1,
        "cluster.feeder_disk": "1GiB",
        "cluster.feeder_resources": {"feeder": 1.0},
        "cluster.replica_resources": {"trainer": 1.0},
    }
    with FedSide(load_config(flags=flags)) as side:
        side.epoch()
        turns = [side.epoch() for _ in range(repeats)]
        marks = side.disk()
    stall_s, epoch_s = (median(values) for values in zip(*turns, strict=True))
    name = "the epoch"
    yield {**record("cluster", "feeder_stall", "s/epoch", stall_s, epoch_s, name, False, repeats), "target": 0.1}
    who, used, budget = max(marks, key=lambda mark: mark[1] / mark[2])
    found = record("cluster", "feeder_disk", "bytes", used, budget, f"budget of the {who}", False, repeats)
    yield {**found, "target": 1.0, "marks": marks}


def run(*, scale: float, repeats: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of all cases."""
    graph = _graph(folder, scale)
    yield from two_replicas(graph, folder, scale, repeats)
    yield from sums(folder, scale, repeats)
    yield from feeder_stall(graph, folder, scale, repeats)
