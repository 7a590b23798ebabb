"""Exact outputs of a model, layer by layer over all in-neighbours, out of core.

Layer l of every node is computed from a table of layer l-1 and written to a table of its own, so each is computed once,
as in GAS (Fey et al., ICML 2021, section 3) and PyG's `inference` recipes; ours keeps a memory budget: destinations
come in chunks whose sources, block and temporaries fit, and a table that fits stays in memory while it is read.

Tables are `layer-N.npy` float32 in a scratch folder, each with a `layer-N.json` that ties it to model, graph and
targets, so a finished layer is not computed again. Letters: D destinations, S sources, E edges of a chunk, F features.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import nn

from penstock.engine.checkpoint import model_checksum
from penstock.engine.minibatch import Block
from penstock.engine.rowtable import RowTable, buffer_bytes
from penstock.engine.topology import ChunkCosts, InEdges
from penstock.storage.budget import format_bytes, require_free_disk
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json, write_json
from penstock.storage.npyfile import NpyWriter, open_npy
from penstock.storage.progress import Progress, silent
from penstock.storage.rows import RowFormat, decode_rows

logger = logging.getLogger(__name__)


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

    def open(self) -> NDArray[np.float32]:
        """Map the table read-only, float32 [num_rows, width]."""
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


def _single_block() -> Block:
    return Block(
        num_src=1,
        num_dst=1,
        indptr=torch.tensor([0, 1], dtype=torch.int32),
        indices=torch.zeros(1, dtype=torch.int32),
        edge_weights=torch.ones(1),
        src_degrees=torch.ones(1, dtype=torch.int32),
    )


def _layer_widths(model: nn.Module, num_features: int, num_layers: int, device: torch.device) -> list[int]:
    """Columns of every layer's input, and of the last one's output, found by running one node through."""
    widths, x = [num_features], torch.zeros(1, num_features, device=device)
    for layer in range(num_layers):
        x = model.layer_forward(layer, _single_block().to(device), x)  # type: ignore[operator]  # checked by the caller
        widths.append(x.shape[1])
    return widths


def _costs(model: nn.Module, layer: int, row_format: RowFormat, out_width: int, num_nodes: int) -> ChunkCosts:
    layers = getattr(model, "layers", None)
    params = list((layers[layer] if layers is not None else model).parameters())
    wide = max([row_format.width, out_width, *(max(p.shape, default=1) for p in params)])
    heads = max([1, *(p.shape[-2] for p in params if p.ndim == 3)])
    decode = 0 if row_format.dtype == "float32" else 4 * row_format.width
    return ChunkCosts(
        source=row_format.row_bytes + decode + 8 * wide + 64,
        destination=4 * (2 * row_format.width + 3 * wide) + 96,
        edge=56 + 16 * heads,
        num_nodes=num_nodes,
    )


def _is_finished(scratch: Path, layer: int, key: dict[str, Any]) -> bool:
    table, marker = scratch / f"layer-{layer}.npy", scratch / f"layer-{layer}.json"
    if not (table.is_file() and marker.is_file()):
        return False
    found = read_json(marker)
    return bool(found["key"] == key and found["bytes"] == table.stat().st_size)


class _Pass:
    """One layer over all its destinations."""

    def __init__(
        self, model: nn.Module, graph: GraphStore, layer: int, source: LayerTable | None, width: int, threads: int
    ) -> None:
        self.model, self.graph, self.layer, self.width, self.threads = model, graph, layer, width, threads
        self.path = source.path if source else graph.feature_path
        self.row_format = source.row_format if source else graph.row_format
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.costs = _costs(model, layer, self.row_format, width, graph.num_nodes)
        self._rows = np.empty((0, self.row_format.row_bytes), np.uint8)

    def split_budget(self, host_memory: int, max_degree: int) -> tuple[bool, int]:
        """Whether the source table is held in memory, and the bytes left for a chunk; DoesNotFit where too few are."""
        table_bytes = self.graph.num_nodes * self.row_format.row_bytes
        hub_bytes = int(self.costs.chunk(1, max_degree))
        if host_memory - table_bytes >= max(hub_bytes, host_memory // 4):
            return True, host_memory - table_bytes
        chunk_bytes = host_memory - buffer_bytes(self.row_format.row_bytes)
        if chunk_bytes < hub_bytes:
            raise DoesNotFit(
                f"layer {self.layer} needs {format_bytes(hub_bytes)} for the node with {max_degree} in-neighbours, "
                f"host_memory={format_bytes(host_memory)} leaves {format_bytes(max(0, chunk_bytes))}; give it at least "
                f"{hub_bytes + buffer_bytes(self.row_format.row_bytes)} bytes, or evaluate on sampled neighbours"
            )
        return False, chunk_bytes

    def run(self, edges: InEdges, out: Path, host_memory: int, progress: Progress) -> str:
        """Write the layer's table and return its checksum."""
        resident, chunk_bytes = self.split_budget(host_memory, edges.max_degree())
        if self.device.type == "cuda":
            chunk_bytes = min(chunk_bytes, torch.cuda.mem_get_info(self.device)[0] // 2)
        needs_degrees = bool(getattr(self.model, "needs_degrees", True))
        row_bytes, num_nodes = self.row_format.row_bytes, self.graph.num_nodes
        require_free_disk(out.parent, edges.num_dst * self.width * 4, f"the table of layer {self.layer}")
        with (
            RowTable(self.path, row_bytes, num_nodes, resident=resident, threads=self.threads) as table,
            NpyWriter(out, "<f4", (edges.num_dst, self.width)) as writer,
        ):
            for lo, hi in edges.chunks(self.costs, chunk_bytes):
                block, dst, others = edges.block(lo, hi, needs_degrees)
                x = self._gather(table, dst, others)
                output = self.model.layer_forward(self.layer, block.to(self.device), x.to(self.device))  # type: ignore[operator]
                writer.append(output.float().cpu().numpy())
                progress(f"exact layer {self.layer}", hi, edges.num_dst, "rows")
        assert writer.entry is not None
        return writer.entry.xxh3

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

    The model needs `layer_forward(layer, block, x)`. Memory beyond the model stays within `host_memory` bytes. Tables
    go to `scratch`; layers finished by an earlier call for the same model, graph and targets are reused.
    Values are the same for any budget, but for the rounding of matrix products of other sizes.
    Raises DoesNotFit, before a layer is computed, where one node's neighbourhood alone exceeds the budget.
    """
    if not hasattr(model, "layer_forward"):
        raise ValueError(
            f"{type(model).__name__} has no layer_forward(layer, block, x), so it cannot be computed layer by layer; "
            "add that method, or evaluate on sampled neighbours"
        )
    total = num_layers or len(model.layers)  # type: ignore[arg-type]
    was_training, before = model.training, torch.get_num_threads()
    model.to(device).eval()
    torch.set_num_threads(threads)
    try:
        return _run_layers(model, graph, scratch, host_memory, threads, torch.device(device), targets, total, progress)
    finally:
        model.train(was_training)
        torch.set_num_threads(before)


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
    ids = None if targets is None else np.unique(targets)
    widths = _layer_widths(model, graph.meta.num_features, total, device)
    checksum = model_checksum(model)
    table: LayerTable | None = None
    for layer in range(total):
        last = ids if layer == total - 1 else None
        key = {"model": checksum, "graph": graph.fingerprint, "targets": _digest(last)}
        path = scratch / f"layer-{layer + 1}.npy"
        edges = InEdges(graph, last)
        if not _is_finished(scratch, layer + 1, key):
            (scratch / f"layer-{layer + 1}.json").unlink(missing_ok=True)  # before the table that it speaks of changes
            one = _Pass(model, graph, layer, table, widths[layer + 1], threads)
            xxh3 = one.run(edges, path, host_memory, progress)
            write_json(path.with_suffix(".json"), {"key": key, "bytes": path.stat().st_size, "xxh3": xxh3})
        table = LayerTable(path=path, layer=layer + 1, num_rows=edges.num_dst, width=widths[layer + 1], ids=last)
    assert table is not None
    return table


def _digest(ids: NDArray[Any] | None) -> str:
    return "all" if ids is None else str(xxhash.xxh3_64_hexdigest(ids.astype(np.int64).tobytes()))
