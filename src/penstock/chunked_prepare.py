"""From a graph to ranks that can start: chunks, the choice of stages and parts, features in memory or in packs.

Each step is skipped when it is done. Memory is one budget for all replicas together, in equal shares: features and
topology come first, the rest is shared out among the ranks, for what they keep of activations and for histories; what
does not fit goes to disk.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from penstock.chunked_choice import Sizes, choose_ranks, size_ranks
from penstock.claims import claim
from penstock.engine import recycled
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.features import TRAIN_SHARE
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.planning import plan_replica
from penstock.engine.chunked.schedule import load_sequence
from penstock.engine.chunked.setup import make_specs
from penstock.engine.chunked.spec import FeatureSpec, RankSpec
from penstock.engine.chunked.trainer import initial_weights
from penstock.engine.layered import first_hidden
from penstock.process_memory import Forecast
from penstock.remedies import with_remedy
from penstock.run import Run, make_model
from penstock.sampler.chunking.config import PartitionConfig
from penstock.sampler.chunking.trace import write_chunk_trace
from penstock.sampler.chunking.write import write_chunks
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.storage.budget import format_bytes, total_memory, trim_heap
from penstock.storage.chunks import ChunkStore, open_chunks
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.manifest import is_published, read_json, write_json
from penstock.storage.pack import feed_memory, is_complete, open_packset

logger = logging.getLogger(__name__)

_CHOICE = "chunked.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRanks:
    """What training starts from. `model` has the initial weights."""

    model: nn.Module
    chunks: ChunkStore
    layout: Layout
    specs: list[RankSpec]
    memory: Forecast


def _open_cut(folder: Path) -> ChunkStore | None:
    """The chunks that are there; a damaged cut is left to `write_chunks`, which says so and makes it anew."""
    if not is_published(folder):
        return None
    try:
        return open_chunks(folder)
    except FormatError:
        return None


def cut_graph(run: Run, parts: int) -> ChunkStore:
    """Cut the graph into chunks for so many parts, in `run/chunks`."""
    config, folder = run.config.chunked, run.path / "chunks" / f"{run.config.chunked.chunks}x{parts}"
    asked = PartitionConfig(chunks=config.chunks, parts=parts, method=config.partition, seed=config.partition_seed)
    if (store := _open_cut(folder)) is not None:
        method = store.meta.method if config.partition == "auto" else config.partition
        if (store.meta.graph, store.meta.method, store.meta.seed) == (run.graph.fingerprint, method, asked.seed):
            logger.info("reused %s: the graph is cut already", folder)
            return store
        shutil.rmtree(folder)
    if config.partition == "auto" and run.trained is not None:  # who cut it then, although now another might
        asked = asked.model_copy(update={"method": run.trained.keys["chunked.partition"]})
    with run.timings.during("cut"):
        store = write_chunks(
            run.graph,
            folder,
            asked,
            host_memory=run.budgets.host_bytes,
            threads=run.threads,
            progress=run.progress,
        )
    logger.info("cut the graph with %s: %d parts of %d chunks", store.meta.method, parts, store.meta.num_chunks)
    return store


def _resolve(run: Run, model: nn.Module) -> ChunkedConfig:
    """The configuration with stages and parts: as given, or as chosen for `devices`, once for the run."""
    config = run.config.chunked
    if config.devices is None or (config.stages, config.parts) != (1, 1):
        return config
    path = run.results / _CHOICE
    value = read_json(path) if path.is_file() else {}
    if value.get("devices") != config.devices or not {"stages", "parts"} <= set(value):
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


def _still_fits(packs: Path, host_bytes: int, disk_bytes: int) -> bool:
    """Whether packs are complete, and may be used as they are."""
    if not is_complete(packs):
        return False
    meta = open_packset(packs)
    needed = feed_memory(
        host_slots=meta.host_slots,
        row_bytes=meta.row_format.row_bytes,
        max_extent_bytes=meta.max_extent_bytes,
        max_inputs=meta.max_inputs,
        width=meta.width,
    )
    return needed <= host_bytes and sum(file.stat().st_size for file in packs.iterdir()) <= disk_bytes


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
    packs, disk_bytes = out / "packs", run.budgets.disk_bytes // run.config.cluster.replicas
    made_of = {
        "chunks": asdict(chunks.meta),
        "part": part,
        "sequence": [list(loads) for loads in sequence],
        "halo": halo,
        "row_dtype": plan.row_dtype or run.graph.meta.feature_dtype,
        "policy": plan.policy,
    }
    claim(
        out,
        made_of,
        {"host_bytes": host_bytes, "disk_bytes": disk_bytes},
        kept=("trace",),
        still_good=lambda: _still_fits(packs, host_bytes, disk_bytes),
    )
    if is_complete(packs):
        logger.info("reused %s: it is packed already", packs)
        return packs
    half = run.budgets.host_bytes // 2
    with _of_whole(run, half), run.timings.during("sample"):
        trace = write_chunk_trace(
            run.graph,
            chunks,
            part,
            out / "trace",
            sequence=sequence,
            halo=halo,
            host_memory=half,
            progress=run.progress,
        )
    budgets = replace(run.budgets, host_bytes=host_bytes, device_bytes=0, disk_bytes=disk_bytes)
    with _of_whole(run, host_bytes), run.timings.during("plan"):
        planned = plan_packs(
            run.graph, trace, plan, budgets, disk_rates=run.disk_rates, scratch=out / "plan", progress=run.progress
        )
    if planned.mode != "reuse":
        assert planned.summary is not None
        raise DoesNotFit(
            f"the packs of part {part} need {planned.summary.disk_needed_bytes} bytes of disk, --disk gives "
            f"{disk_bytes}{' to each replica' if run.config.cluster.replicas > 1 else ''}; use --disk "
            f"{planned.summary.disk_needed_bytes * run.config.cluster.replicas} or more, lower chunked.cycle_orders, "
            "or give more --host-memory",
            disk_bytes=planned.summary.disk_needed_bytes * run.config.cluster.replicas,
        )
    with _of_whole(run, half), run.timings.during("pack"):
        write_packs(planned, run.graph, trace, packs, host_memory=half, progress=run.progress)
    for scratch in ("trace", "plan"):
        shutil.rmtree(out / scratch, ignore_errors=True)
    logger.info("packed features of part %d into %s", part, packs)
    return packs


@contextmanager
def _of_whole(run: Run, part: int) -> Iterator[None]:
    """Let a step that has a part of the host memory name what the whole has to be."""
    try:
        yield
    except DoesNotFit as error:
        if error.host_bytes is None:
            raise
        whole = run.budgets.host_bytes
        enough = math.ceil(error.host_bytes * whole / max(part, 1)) + 1
        problem = str(error).partition("; use ")[0]
        raise DoesNotFit(
            f"--host-memory {format_bytes(whole)} is too small: {problem}, its share; use --host-memory {enough} or "
            "more, or more chunks",
            host_bytes=enough,
            disk_bytes=error.disk_bytes,
        ) from error


def _features(run: Run, chunks: ChunkStore, config: ChunkedConfig, model: nn.Module, sizes: Sizes) -> list[FeatureSpec]:
    """By replica and part: in memory where they fit or the user wants it, else packs.

    Packs are in the order of a replica; exact passes have one order, and so packs that all replicas read.
    """
    replicas = run.config.cluster.replicas
    if sizes.features == "memory":
        return [FeatureSpec(kind="memory", row_dtype=run.config.plan.row_dtype)] * (config.parts * replicas)
    reuse = PlanConfig(mode="reuse", row_dtype=run.config.plan.row_dtype)
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


def _size(run: Run, model: nn.Module) -> tuple[ChunkedConfig, ChunkStore, Sizes]:
    """Cut the graph, and share out the memory: all that may find that it is too small."""
    config = _resolve(run, model)
    chunks = cut_graph(run, config.parts)
    return config, chunks, size_ranks(run, chunks, config, model)


def prepare_ranks(run: Run) -> PreparedRanks:
    """Do all that comes before training. DoesNotFit names what is too small, ValueError a model that cannot be cut."""
    model = make_model(run)
    config, chunks, sizes = with_remedy(run, lambda: _size(run, model))
    sizes.memory.check(run.budgets.host_bytes, total_memory())
    features = _features(run, chunks, config, model, sizes)
    folder = run.results / "ranks"
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
    run.graph.drop_mapped()
    recycled.release()
    trim_heap()
    return PreparedRanks(model=model, chunks=chunks, layout=specs[0].layout, specs=specs, memory=sizes.memory)
