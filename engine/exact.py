"""Exact outputs of a model, layer by layer over all in-neighbours, out of core.

Layer l of every node is computed from a table of layer l-1 and written to a table of its own, so each is computed once,
as in GAS (Fey et al., ICML 2021, section 3) and PyG's `inference` recipes; ours keeps a memory budget: destinations
come in chunks whose sources, block and temporaries fit, and a table that fits stays in memory while it is read.

Tables are `layer-N.npy` float32 in a scratch folder, each with a `layer-N.json` that ties it to all that its bits
depend on (see `table_key`), so a finished layer is not computed again, and no other one is taken for it.

Letters: D destinations, S sources, E edges of a chunk, F features.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from penstock.engine.aggregate import uses_kernels
from penstock.engine.minibatch import Block
from penstock.engine.models import count_layers, layer_forward
from penstock.engine.rowtable import RowTable, buffer_bytes
from penstock.engine.tablekey import function_digest, probe_layers
from penstock.engine.topology import ChunkCosts, InEdges, count_self_loops
from penstock.engine.workspace import own_folder
from penstock.storage.blocks import BlockSums, read_block_sums, sums_name
from penstock.storage.budget import format_bytes, require_free_disk
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import FileEntry, read_json, verify_once, write_json
from penstock.storage.npyfile import NpyWriter, open_npy
from penstock.storage.progress import Progress, silent
from penstock.storage.rows import RowFormat, decode_rows

logger = logging.getLogger(__name__)

_REMEDY = "run the same command again: it computes the table anew"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Outputs of layer `layer` (1 is the first): row n of the table is of node n, or of node `ids[n]`, ascending."""

    path: Path
    layer: int
    num_rows: int
    width: int
    ids: NDArray[Any] | None

    @property
    def row_format(self) -> RowFormat:
        """float32 rows."""
        return RowFormat(dtype="float32", width=self.width)

    @property
    def marker(self) -> Path:
        """The file that says what the table is of, and its checksums; without it, it is not finished."""
        return self.path.with_suffix(".json")

    def entry(self) -> FileEntry:
        """What a finished table's file is; FormatError where the marker is missing or damaged."""
        found, shape = read_json(self.marker), (self.num_rows, self.width)
        return FileEntry(name=self.path.name, bytes=found["bytes"], dtype="float32", shape=shape, xxh3=found["xxh3"])

    def sums(self) -> BlockSums:
        """Checksums of the blocks of a finished table."""
        sums, num_bytes = self.path.with_name(sums_name(self.path.name)), 4 * self.num_rows * self.width
        return read_block_sums(sums, read_json(self.marker)["sums"], self.path, num_bytes, _REMEDY)

    def open(self) -> NDArray[np.float32]:
        """Map the table read-only, float32 [num_rows, width], after verifying it."""
        verify_once(self.path, self.entry(), _REMEDY)
        return open_npy(self.path)

    def below(self, layer: int) -> "LayerTable":
        """The table of an earlier layer of the same pass, which has all nodes; the table itself for its own layer."""
        if layer == self.layer:
            return self
        path = self.path.with_name(f"layer-{layer}.npy")
        num_rows, width = open_npy(path).shape
        return LayerTable(path=path, layer=layer, num_rows=num_rows, width=width, ids=None)

    def positions(self, node_ids: NDArray[Any]) -> NDArray[Any]:
        """Rows of nodes; ValueError for a node that is not in the table."""
        if self.ids is None:
            return node_ids
        rows = np.minimum(np.searchsorted(self.ids, node_ids), max(0, self.num_rows - 1))
        if len(node_ids) and (not self.num_rows or (self.ids[rows] != node_ids).any()):
            raise ValueError("a node was asked for that is not among the targets; pass it in `targets`")
        return rows


def single_block(device: torch.device) -> Block:
    """One node with an edge to itself: enough to learn who uses what."""
    return Block(
        num_src=1,
        num_dst=1,
        indptr=torch.tensor([0, 1], dtype=torch.int32, device=device),
        indices=torch.zeros(1, dtype=torch.int32, device=device),
        edge_weights=torch.ones(1, device=device),
        src_degrees=torch.ones(1, dtype=torch.int32, device=device),
    )


def _costs(
    model: nn.Module, layer: int, row_format: RowFormat, out_width: int, num_nodes: int, device: torch.device
) -> ChunkCosts:
    modules = [model.layers[layer]]  # type: ignore[index]  # a ModuleList
    if layer == 0:
        modules.append(getattr(model, "encoder", None) or nn.Identity())
    params = [p for module in modules for p in module.parameters()]  # type: ignore[union-attr]
    wide = max([out_width, *(len(p) for p in params if p.ndim)])  # outputs come first in torch's weights
    heads = max([1, *(p.shape[-2] for p in params if p.ndim == 3)])
    decode = 0 if row_format.dtype == "float32" else 4 * row_format.width
    return ChunkCosts(
        source=row_format.row_bytes + decode + 8 * wide + 64,
        destination=4 * (2 * row_format.width + 3 * wide) + 96,
        edge=56 + 16 * heads if uses_kernels(device) else 80 + 32 * heads,
        num_nodes=num_nodes,
    )


def _needs_degrees(model: nn.Module) -> bool:
    return bool(getattr(model, "needs_degrees", True))


class _Pass:
    """One layer over all its destinations: `source` None is the feature table, `out` what is written."""

    def __init__(
        self,
        model: nn.Module,
        graph: GraphStore,
        source: LayerTable | None,
        out: LayerTable,
        threads: int,
        loops: NDArray[Any] | None,
    ) -> None:
        self.model, self.graph, self.out, self.threads = model, graph, out, threads
        self.edges = InEdges(graph, out.ids, loops)
        self._loop_bytes = 0 if loops is None else loops.nbytes
        self.path = source.path if source else graph.feature_path
        self._source = source
        self.row_format = source.row_format if source else graph.row_format
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.costs = _costs(model, out.layer - 1, self.row_format, out.width, graph.num_nodes, self.device)
        self._rows = np.empty((0, self.row_format.row_bytes), np.uint8)

    def sums(self) -> BlockSums | None:
        """Checksums of the blocks of the table that is read."""
        return self.graph.feature_sums if self._source is None else self._source.sums()

    def is_finished(self, key: dict[str, Any]) -> bool:
        """Whether an earlier call has written this very table."""
        if not self.out.marker.is_file():
            return False
        try:
            if read_json(self.out.marker).get("key") != key:
                return False
            verify_once(self.out.path, self.out.entry(), "it is computed anew")
            self.out.sums()
        except (FormatError, KeyError) as error:
            logger.warning("a table of an earlier pass is not used: %s", error)
            return False
        return True

    def split_budget(self, host_memory: int) -> tuple[bool, int]:
        """Whether the source table is held in memory, and the bytes left for a chunk; DoesNotFit where too few are."""
        table_bytes = self.graph.num_nodes * self.row_format.row_bytes
        available = host_memory - self._loop_bytes
        read_bytes = buffer_bytes(self.row_format.row_bytes)
        max_degree = self.edges.max_degree
        hub_bytes = int(self.costs.chunk(1, max_degree))
        resident_bytes = max(table_bytes + hub_bytes, -(-4 * table_bytes // 3))  # a quarter is left for chunks
        if available >= resident_bytes:
            return True, available - table_bytes
        least = min(resident_bytes, read_bytes + hub_bytes)
        if available < least:
            raise DoesNotFit(
                f"layer {self.out.layer} needs {format_bytes(hub_bytes)} for the node with {max_degree} in-neighbours "
                f"and {format_bytes(read_bytes)} to read, it has {format_bytes(host_memory)}; use --host-memory "
                f"{least + self._loop_bytes} or more, or evaluate on sampled neighbours",
                host_bytes=least + self._loop_bytes,
            )
        return False, available - read_bytes

    def lacks(self, host_memory: int) -> DoesNotFit | None:
        """The error of `split_budget`, if it is one."""
        try:
            self.split_budget(host_memory)
        except DoesNotFit as error:
            return error
        return None

    def peak_bytes(self, host_memory: int) -> int:
        """What the pass holds at most. DoesNotFit as in `split_budget`."""
        resident, chunk_bytes = self.split_budget(host_memory)
        row_bytes, num_nodes = self.row_format.row_bytes, self.graph.num_nodes
        table = num_nodes * row_bytes if resident else buffer_bytes(row_bytes)
        whole = int(self.costs.chunk(self.out.num_rows, self.graph.num_edges))
        return table + min(chunk_bytes, whole)

    def run(self, key: dict[str, Any], host_memory: int, progress: Progress) -> None:
        """Write the layer's table, then the marker that says so."""
        resident, chunk_bytes = self.split_budget(host_memory)
        if self.device.type == "cuda":
            chunk_bytes = min(chunk_bytes, torch.cuda.mem_get_info(self.device)[0] // 2)
        out, marker = self.out, self.out.marker
        marker.unlink(missing_ok=True)  # before the table that it speaks of changes
        require_free_disk(out.path.parent, out.num_rows * out.width * 4, f"the table of layer {out.layer}")
        row_bytes, num_nodes = self.row_format.row_bytes, self.graph.num_nodes
        with (
            RowTable(self.path, row_bytes, num_nodes, self.sums(), resident=resident, threads=self.threads) as table,
            NpyWriter(out.path, "<f4", (out.num_rows, out.width), blocks=True) as writer,
        ):
            for lo, hi in self.edges.chunks(self.costs, chunk_bytes):
                writer.append(self._compute(table, lo, hi))
                progress(f"exact layer {out.layer}", hi, out.num_rows, "rows")
        assert writer.entry is not None and writer.sums_entry is not None
        checksums = {"bytes": writer.entry.bytes, "xxh3": writer.entry.xxh3, "sums": writer.sums_entry.xxh3}
        write_json(marker, {"key": key, **checksums})

    def _compute(self, table: RowTable, lo: int, hi: int) -> NDArray[np.float32]:
        block, dst, others = self.edges.block(lo, hi, _needs_degrees(self.model))
        x = self._gather(table, dst, others)
        output = layer_forward(self.model, self.out.layer - 1, block.to(self.device), x.to(self.device))
        return output.float().cpu().numpy()

    def _gather(self, table: RowTable, dst: NDArray[Any], others: NDArray[Any]) -> torch.Tensor:
        count = len(dst) + len(others)
        if count > len(self._rows):
            self._rows = np.empty((0, 0), np.uint8)  # first, so that the old one is not held beside the new one
            self._rows = np.empty((count, self.row_format.row_bytes), np.uint8)
        rows = self._rows[:count]
        table.gather(dst, rows[: len(dst)])
        table.gather(others, rows[len(dst) :])
        if self.row_format.dtype == "float32":
            return torch.from_numpy(rows.view(np.float32))
        return torch.from_numpy(decode_rows(rows, self.row_format))


def table_key(model: nn.Module, graph: GraphStore, *, device: torch.device, host_memory: int) -> dict[str, Any]:
    """What the bits of a table depend on, but for its layer and targets.

    The budget is among it: chunks of other sizes may round otherwise.
    """
    return {
        "function": function_digest(model),
        "graph": graph.fingerprint,
        "device": device.type,
        "host_memory": host_memory,
    }


@contextmanager
def exact_tables(
    model: nn.Module,
    graph: GraphStore,
    parent: Path,
    *,
    host_memory: int,
    threads: int,
    device: torch.device | str = "cpu",
    targets: NDArray[Any] | None = None,
    progress: Progress = silent,
) -> Iterator[LayerTable]:
    """`exact_embeddings` in a folder below `parent` that no other process or thread uses, deleted at the end.

    After a kill or an error the next call of the same key continues it; folders that others left are deleted.
    """
    key = table_key(model, graph, device=torch.device(device), host_memory=host_memory)
    with own_folder(parent, str(xxhash.xxh3_64_hexdigest(repr(key).encode()))) as folder:
        yield exact_embeddings(
            model,
            graph,
            folder,
            host_memory=host_memory,
            threads=threads,
            device=device,
            targets=targets,
            progress=progress,
        )


@torch.no_grad()
def exact_embeddings(
    model: nn.Module,
    graph: GraphStore,
    scratch: Path,
    *,
    host_memory: int,
    threads: int,
    device: torch.device | str = "cpu",
    targets: NDArray[Any] | None = None,
    num_layers: int | None = None,
    progress: Progress = silent,
) -> LayerTable:
    """Compute the outputs of the first `num_layers` layers (all by default), the last one for `targets` only if given.

    See `models.layer_forward` for what the model must have. Memory beyond the model stays within `host_memory`
    bytes. Tables go to `scratch`, which nobody else may use meanwhile (see `exact_tables`); layers that an earlier call
    finished are reused where all is equal that their bits depend on. Values are the same for any budget, but for the
    rounding of matrix products of other sizes.
    Raises DoesNotFit, before a layer is computed, where one node's neighbourhood alone exceeds the budget.
    """
    total = num_layers or count_layers(model)
    was_training, before = model.training, torch.get_num_threads()
    model.to(device).eval()
    torch.set_num_threads(threads)
    try:
        return _run_layers(model, graph, scratch, host_memory, threads, torch.device(device), targets, total, progress)
    finally:
        model.train(was_training)
        torch.set_num_threads(before)


def exact_peak_bytes(model: nn.Module, graph: GraphStore, host_memory: int, targets: NDArray[Any] | None = None) -> int:
    """What `exact_embeddings` of all layers holds at most. DoesNotFit where it would raise it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            passes, _ = _make_passes(model, graph, Path(), 1, torch.device("cpu"), targets, count_layers(model))
        _require_memory(passes, host_memory)
        return max(one.peak_bytes(host_memory) for one in passes)
    finally:
        model.train(was_training)


def _run_layers(
    model: nn.Module,
    graph: GraphStore,
    scratch: Path,
    host_memory: int,
    threads: int,
    device: torch.device,
    targets: NDArray[Any] | None,
    total: int,
    progress: Progress,
) -> LayerTable:
    scratch.mkdir(parents=True, exist_ok=True)
    passes, probes = _make_passes(model, graph, scratch, threads, device, targets, total)
    common = table_key(model, graph, device=device, host_memory=host_memory)
    keys = [{**common, "probes": probes[:n], "targets": _digest(one.out.ids)} for n, one in enumerate(passes, 1)]
    due = [(one, key) for one, key in zip(passes, keys, strict=True) if not one.is_finished(key)]
    _require_memory([one for one, _ in due], host_memory)
    for one, key in due:
        one.run(key, host_memory, progress)
    return passes[-1].out


def require_exact_memory(
    model: nn.Module, graph: GraphStore, *, host_memory: int, targets: NDArray[Any] | None = None
) -> None:
    """DoesNotFit, naming the smallest that would do, where `exact_embeddings` could not work; nothing is computed."""
    model.eval()
    total = count_layers(model)
    with torch.no_grad():
        passes, _ = _make_passes(model, graph, Path(), 1, torch.device("cpu"), targets, total)
    _require_memory(passes, host_memory)


def _require_memory(passes: list[_Pass], host_memory: int) -> None:
    lacking = [error for one in passes if (error := one.lacks(host_memory)) is not None]
    if lacking:
        raise max(lacking, key=lambda error: error.host_bytes or 0)


def _make_passes(
    model: nn.Module,
    graph: GraphStore,
    scratch: Path,
    threads: int,
    device: torch.device,
    targets: NDArray[Any] | None,
    total: int,
) -> tuple[list[_Pass], list[Any]]:
    """The layers that are to be computed, and what tells each from others."""
    ids = None if targets is None else np.unique(targets)
    widths, probes = probe_layers(model, graph.meta.num_features, total, device)
    loops = count_self_loops(graph) if _needs_degrees(model) else None
    passes: list[_Pass] = []
    for layer in range(1, total + 1):
        last = ids if layer == total else None
        num_rows = graph.num_nodes if last is None else len(last)
        path = scratch / f"layer-{layer}.npy"
        out = LayerTable(path=path, layer=layer, num_rows=num_rows, width=widths[layer], ids=last)
        passes.append(_Pass(model, graph, passes[-1].out if passes else None, out, threads, loops))
    return passes, list(probes)


def _digest(ids: NDArray[Any] | None) -> str:
    return "all" if ids is None else str(xxhash.xxh3_64_hexdigest(ids.astype(np.int64).tobytes()))
