"""From a graph to ranks that can start: chunks, the choice of stages and parts, features in memory or in packs.

Each step is skipped when it is done. Memory is one budget for all replicas together, in equal shares: features and
topology come first, the rest is shared out among the ranks, for what they keep of activations and for histories; what
does not fit goes to disk.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from penstock.chunked_choice import Sizes, choose_ranks, size_ranks
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.features import TRAIN_SHARE
from penstock.engine.chunked.layout import Layout, split_stages
from penstock.engine.chunked.ownership import owned_names, unit_tensors
from penstock.engine.chunked.planning import plan_replica
from penstock.engine.chunked.schedule import load_sequence
from penstock.engine.chunked.setup import make_specs, unit_costs
from penstock.engine.chunked.spec import FeatureSpec, RankSpec
from penstock.engine.chunked.trainer import initial_weights
from penstock.engine.layered import check_chunkable, first_hidden
from penstock.run import Run, make_model
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.trace import write_chunk_trace
from penstock.sampler.chunking.write import write_chunks
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.storage.chunks import ChunkStore
from penstock.storage.errors import DoesNotFit
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import is_complete

_CHOICE = "chunked.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRanks:
    """What training starts from. `model` has the initial weights."""

    model: nn.Module
    chunks: ChunkStore
    layout: Layout
    specs: list[RankSpec]


def _refuse_impossible(run: Run, model: nn.Module) -> None:
    """ValueError, before any work, for what no preparation could make trainable."""
    graph, num_features = run.graph, run.graph.meta.num_features
    ids = graph.split_ids("train")
    if not len(ids) or not (graph.meta.multi_label or (graph.labels[ids] >= 0).any()):
        raise ValueError(f"{graph.path} has {len(ids)} train nodes, none with a label; give it some, as `train`")
    check_chunkable(model, num_features)
    units = split_stages(unit_costs(model, graph), run.config.chunked.stages)
    owned_names(unit_tensors(model, num_features), [(unit.start, unit.stop) for unit in units])


def cut_graph(run: Run, parts: int) -> ChunkStore:
    """Cut the graph into chunks for so many parts, in `run/chunks`."""
    config = run.config.chunked
    return write_chunks(
        run.graph,
        run.path / "chunks" / f"{config.chunks}x{parts}",
        PartitionConfig(chunks=config.chunks, parts=parts, method=config.partition, seed=config.partition_seed),
        host_memory=run.budgets.host_bytes,
        threads=run.threads,
        progress=run.progress,
    )


def _resolve(run: Run, model: nn.Module) -> ChunkedConfig:
    """The configuration with stages and parts: as given, or as chosen for `devices`, once for the run."""
    config = run.config.chunked
    if config.devices is None or (config.stages, config.parts) != (1, 1):
        return config
    path = run.path / _CHOICE
    value = read_json(path) if path.is_file() else {}
    if value.get("devices") != config.devices:
        choice = choose_ranks(run, model, lambda parts: cut_graph(run, parts))
        value = {"devices": config.devices, "stages": choice.stages, "parts": choice.parts}
        write_json(path, value)
    return config.resolved(value["stages"], value["parts"])


def _sequences(config: ChunkedConfig, seed: int, recompute: bool, replica: int) -> list[tuple[int, ...]]:
    """What stage 0 of a replica loads in every epoch of a cycle."""
    alone = Layout(1, 1, replica + 1)
    plans = (
        plan_replica(alone, config, config.chunks, seed=seed, epoch=epoch, recompute=recompute, replica=replica)
        for epoch in range(config.cycle_orders)
    )
    return [load_sequence(plan) for plan in plans]


def _pack(
    run: Run,
    chunks: ChunkStore,
    part: int,
    out: Path,
    sequence: Sequence[Sequence[int]],
    *,
    halo: bool,
    plan: PlanConfig,
    host_bytes: int,
) -> Path:
    """Pack the features of a sequence of loads; returns the folder of the packs."""
    packs = out / "packs"
    if is_complete(packs):
        return packs
    trace = write_chunk_trace(
        run.graph,
        chunks,
        part,
        out / "trace",
        sequence=sequence,
        halo=halo,
        host_memory=run.budgets.host_bytes // 2,
        progress=run.progress,
    )
    disk_bytes = run.budgets.disk_bytes // run.config.cluster.replicas
    budgets = replace(run.budgets, host_bytes=host_bytes, device_bytes=0, disk_bytes=disk_bytes)
    planned = plan_packs(
        run.graph, trace, plan, budgets, disk_rates=run.disk_rates, scratch=out / "plan", progress=run.progress
    )
    if planned.mode != "reuse":
        assert planned.summary is not None
        raise DoesNotFit(
            f"the packs of part {part} need {planned.summary.disk_needed_bytes} bytes of disk, --disk gives "
            f"{disk_bytes}{' to each replica' if run.config.cluster.replicas > 1 else ''}; raise it, lower "
            "chunked.cycle_orders, or give more --host-memory",
            disk_bytes=planned.summary.disk_needed_bytes * run.config.cluster.replicas,
        )
    write_packs(planned, run.graph, trace, packs, host_memory=run.budgets.host_bytes // 2, progress=run.progress)
    for scratch in ("trace", "plan"):
        shutil.rmtree(out / scratch, ignore_errors=True)
    return packs


def _features(run: Run, chunks: ChunkStore, config: ChunkedConfig, model: nn.Module, sizes: Sizes) -> list[FeatureSpec]:
    """By replica and part: in memory where they fit or the user wants it, else packs.

    Packs are in the order of a replica; exact passes have one order, and so packs that all replicas read.
    """
    replicas = run.config.cluster.replicas
    if sizes.features == "memory":
        return [FeatureSpec(kind="memory", row_dtype=run.config.plan.row_dtype)] * (config.parts * replicas)
    reuse = run.config.plan.model_copy(update={"mode": "reuse"})
    shared: dict[str, Any] = {"halo": first_hidden(model) == 1}
    found = []
    for replica, part in product(range(replicas), range(config.parts)):
        name = f"{config.chunks}x{config.parts}-{part:03d}-{'twice' if sizes.recompute else 'once'}"
        folder = run.path / "features" / (f"{name}-{replicas}" if replicas > 1 else name)  # tiers are planned by share
        sequences = _sequences(config, run.config.train.seed, sizes.recompute, replica)
        train = _pack(
            run,
            chunks,
            part,
            folder / (f"train-{replica:03d}" if replica else "train"),
            sequences,
            plan=reuse,
            host_bytes=int(sizes.feed_bytes * TRAIN_SHARE),
            **shared,
        )
        exact = _pack(
            run,
            chunks,
            part,
            folder / "exact",
            [tuple(range(config.chunks))],
            plan=PlanConfig(policy="none", mode="reuse", row_dtype=reuse.row_dtype),
            host_bytes=int(sizes.feed_bytes * (1 - TRAIN_SHARE)),
            **shared,
        )
        found.append(
            FeatureSpec(
                kind="packs",
                packs=train,
                exact_packs=exact,
                items_per_epoch=len(sequences[0]),
                num_epochs=run.config.train.epochs,
            )
        )
    return found


def prepare_ranks(run: Run) -> PreparedRanks:
    """Do all that comes before training. DoesNotFit names what is too small, ValueError a model that cannot be cut."""
    model = make_model(run)
    _refuse_impossible(run, model)
    config = _resolve(run, model)
    chunks = cut_graph(run, config.parts)
    sizes = size_ranks(run, chunks, config, model)
    features = _features(run, chunks, config, model, sizes)
    folder = run.path / "ranks"
    specs = make_specs(
        graph=run.graph,
        chunks=chunks,
        scratch=folder,
        weights=initial_weights(folder / "initial.safetensors", model),
        model=model,
        model_config=run.config.model,
        train=run.config.train,
        chunked=config,
        features=features,
        recompute=sizes.recompute,
        history_memory=sizes.history_bytes,
        feed_memory=sizes.feed_bytes,
        threads=max(1, run.threads // (config.stages * config.parts * run.config.cluster.replicas)),
        units=sizes.units,
        replicas=run.config.cluster.replicas,
    )
    return PreparedRanks(model=model, chunks=chunks, layout=specs[0].layout, specs=specs)
