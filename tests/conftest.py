"""Fixtures that several folders share."""

import logging
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import xxhash
from hypothesis import settings
from numpy.typing import NDArray

from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.storage.directio import PAGE, page_up
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphMeta, GraphStore, graph_manifest, id_dtype, open_graph
from penstock.storage.manifest import FileEntry, write_manifest
from penstock.storage.npyfile import NpyWriter, write_npy
from penstock.storage.pack import (
    PackIndex,
    PackMode,
    PackSetMeta,
    encode_extent_head,
    layout_extent,
    page_sums,
    publish_packset,
    read_pack_index,
    trace_digest,
    write_pack_index,
    write_packset,
)
from penstock.storage.rows import RowDtype, RowFormat, decode_rows, encode_rows
from penstock.storage.trace import Trace, window_name

# the first call of a kernel compiles it, which no deadline survives
settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")


@pytest.fixture(autouse=True, scope="session")
def interrupts_are_heard() -> None:
    """Shells start what runs in the background (`pytest &`) with SIGINT ignored, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Commands that run in this process configure our logger; the next test finds it untouched."""
    logger = logging.getLogger("penstock")
    level, handlers, propagate = logger.level, list(logger.handlers), logger.propagate
    yield
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagate


@pytest.fixture(scope="session")
def children() -> Callable[[], list[psutil.Process]]:
    """A function that gives our child processes, but for Python's own helper of multiprocessing, which stays."""
    return lambda: [
        child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())
    ]


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A seeded power-law graph: 400 nodes, about 2800 edges, 20 float32 features, 4 classes, splits."""
    config = GenerateConfig(
        num_nodes=400, avg_degree=7, num_features=20, num_classes=4, train=0.4, valid=0.2, test=0.3, seed=7
    )
    return generate_graph(tmp_path_factory.mktemp("tiny") / "graph", config, host_memory=64 << 20)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real graphs `cora` and `facebook`, named by PENSTOCK_DATA."""
    path = os.environ.get("PENSTOCK_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("set PENSTOCK_DATA to the folder that holds cora/ and facebook/")
    return Path(path)


@pytest.fixture(scope="session")
def tiny_trace(tiny_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Two epochs of eight items of the tiny graph, two hops, with degrees, in windows of five."""
    batch_size = -(-len(tiny_graph.split_ids("train")) // 8)
    config = SampleConfig(fanouts=(3, 4), batch_size=batch_size, seed=11, degrees=True, window_items=5)
    out = tmp_path_factory.mktemp("trace") / "trace"
    return sample_trace(tiny_graph, out, config, num_epochs=2, host_memory=64 << 20, threads=2)


class HandPacker:
    """Writes packs straight from the format's description, under a policy that is easy to check by hand.

    After each item the host tier holds the item's smallest node ids that are not on the device, at slots drawn at
    random; so a lap always ends with the same rows, at other slots than it began with. The device holds nodes
    0..D-1. With `shared`, rows that several items of a window miss lie in its shared segment.
    """

    def __init__(
        self,
        folder: Path,
        graph: GraphStore,
        trace: Trace,
        *,
        row_dtype: RowDtype = "float32",
        device_slots: int = 0,
        host_slots: int = 0,
        window_items: int = 3,
        shared: bool = False,
        mode: PackMode = "reuse",
    ) -> None:
        self.folder, self.trace, self.shared, self.mode = folder, trace, shared, mode
        self.device_slots, self.host_slots, self.window_items = device_slots, host_slots, window_items
        self.row_format = RowFormat(dtype=row_dtype, width=graph.row_format.width)
        values = decode_rows(np.array(graph.features), graph.row_format)
        self.rows = np.ascontiguousarray(encode_rows(values, self.row_format)).view(np.uint8)
        self.items = list(trace.items())
        self.rng = np.random.default_rng(5)
        self.host = np.full(host_slots, -1, np.int64)
        self.sizes, self.graph = [0], graph

    def meta(self) -> PackSetMeta:
        return PackSetMeta(
            graph=self.graph.fingerprint,
            trace=trace_digest(self.trace.meta),
            mode=self.mode,
            policy="by hand",
            row_dtype=self.row_format.dtype,
            width=self.row_format.width,
            num_nodes=self.graph.num_nodes,
            device_slots=self.device_slots,
            host_slots=self.host_slots,
            window_items=self.window_items,
            items_per_epoch=self.trace.meta.items_per_epoch,
            num_items=len(self.items),
            max_extent_bytes=max(self.sizes),
            max_inputs=max(len(item.input_ids) for item in self.items),
        )

    def write(self) -> PackSetMeta:
        self.folder.mkdir()
        if self.mode == "reuse":
            for number in range(len(self.items)):
                self.plan(number)
        first = self.host.copy()
        write_packset(self.folder, self.meta())
        for lo in range(0, len(self.items), self.window_items):
            self.write_window(lo, min(lo + self.window_items, len(self.items)))
        if self.mode == "reuse":
            at = {int(node): slot for slot, node in enumerate(self.host) if node >= 0}
            wrap = [(at[int(node)], slot) for slot, node in enumerate(first) if node >= 0]
            last = (len(self.items) - 1) // self.window_items
            moves = write_npy(self.folder / window_name(last, "wrap.npy"), np.array(wrap, np.int32).reshape(-1, 2).T)
            write_pack_index(self.folder, replace(read_pack_index(self.folder, last), wrap_xxh3=moves.xxh3))
        write_packset(self.folder, self.meta())
        publish_packset(self.folder, self.meta())
        return self.meta()

    def plan(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.int64], list[int], list[int]]:
        """Source codes, missing node ids, admitted extent rows and their slots; updates the host tier."""
        ids = np.asarray(self.items[number].input_ids, np.int64)
        place = {int(node): self.device_slots + slot for slot, node in enumerate(self.host) if node >= 0}
        place.update({node: node for node in range(self.device_slots)})
        missing = np.sort(ids[[int(node) not in place for node in ids]])
        place.update({int(node): self.device_slots + self.host_slots + row for row, node in enumerate(missing)})
        source = np.array([place[int(node)] for node in ids], np.int32)
        wanted = set(np.sort(ids[ids >= self.device_slots])[: self.host_slots].tolist())
        self.host[~np.isin(self.host, list(wanted))] = -1
        free = self.rng.permutation(np.flatnonzero(self.host < 0))
        admitted = [row for row, node in enumerate(missing) if int(node) in wanted]
        slots = [int(slot) for slot in free[: len(admitted)]]
        self.host[slots] = missing[admitted]
        return source, missing, admitted, slots

    def write_window(self, lo: int, hi: int) -> None:
        window = lo // self.window_items
        device = np.arange(self.device_slots)
        residents = write_npy(self.folder / window_name(window, "residents.npy"), np.concatenate([device, self.host]))
        plans = [self.plan(number) for number in range(lo, hi)]
        counts = np.bincount(np.concatenate([missing for _, missing, _, _ in plans]), minlength=self.graph.num_nodes)
        common = np.flatnonzero(counts > 1) if self.shared else np.empty(0, np.int64)
        segment = self.rows[common].tobytes()
        segment += bytes(page_up(len(segment)) - len(segment))
        extents = [self.extent(number, *plans[number - lo], common) for number in range(lo, hi)]
        offsets = np.cumsum([len(segment), *map(len, extents)]).tolist()
        (self.folder / window_name(window, "pack")).write_bytes(segment + b"".join(extents))
        index = PackIndex(
            window=window,
            first_item=lo,
            offsets=tuple(offsets[:-1]),
            bytes=tuple(map(len, extents)),
            max_inputs=max(len(self.items[number].input_ids) for number in range(lo, hi)),
            xxh3=tuple(xxhash.xxh3_64_hexdigest(extent) for extent in extents),
            shared_bytes=len(segment),
            residents_xxh3=residents.xxh3,
            pages_xxh3="",
        )
        if segment:
            pages = write_npy(self.folder / window_name(window, "pages.npy"), page_sums(memoryview(segment)))
            index = replace(index, pages_xxh3=pages.xxh3)
        write_pack_index(self.folder, index)

    def extent(
        self,
        number: int,
        source: NDArray[np.int32],
        missing: NDArray[np.int64],
        admitted: list[int],
        slots: list[int],
        common: NDArray[np.int64],
    ) -> bytes:
        is_shared = np.isin(missing, common)
        renumber = np.empty(len(missing), np.int32)
        order = np.concatenate([np.flatnonzero(~is_shared), np.flatnonzero(is_shared)])
        renumber[order] = np.arange(len(missing))
        first, row_bytes = self.device_slots + self.host_slots, self.row_format.row_bytes
        source = source.copy()
        source[source >= first] = first + renumber[source[source >= first] - first]
        starts = np.searchsorted(common, missing[is_shared]) * row_bytes
        pages = sorted({page for at in starts for page in range(at // PAGE, (at + row_bytes - 1) // PAGE + 1)})
        runs = [(page, 1) for page in pages]
        offsets = [pages.index(at // PAGE) * PAGE + at % PAGE for at in starts]
        payload = self.trace.window(number // self.trace.meta.window_items).payload(
            number % self.trace.meta.window_items
        )
        head = layout_extent(
            item=number,
            payload_bytes=len(payload),
            num_inputs=len(source),
            num_admits=len(admitted),
            num_runs=len(runs),
            num_shared=len(offsets),
            num_rows=int((~is_shared).sum()),
            row_bytes=row_bytes,
        )
        self.sizes.append(head.extent_bytes + PAGE * len(runs))
        out = np.zeros(head.extent_bytes, np.uint8)
        encode_extent_head(head, out)

        def put(at: int, array: Any) -> None:
            raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
            out[at : at + len(raw)] = raw

        put(head.payload_offset, payload)
        put(head.source_offset, source)
        put(head.admit_offset, np.array([renumber[admitted], slots], np.int32))
        put(head.runs_offset, np.array(runs, np.int64))
        put(head.shared_offset, np.array(offsets, np.int64))
        put(head.rows_offset, self.rows[missing[~is_shared]])
        return out.tobytes()


@pytest.fixture(scope="session")
def write_hand_packs() -> Callable[..., PackSetMeta]:
    """A function of `HandPacker`'s arguments that writes the packs."""
    return lambda *args, **options: HandPacker(*args, **options).write()


@pytest.fixture(scope="session")
def folder_bytes() -> Callable[[Path], dict[str, bytes]]:
    """A function that reads every file below a folder, so that two folders can be compared byte for byte.

    But for `source.json`: it notes when the input files were seen.
    """
    return lambda folder: {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "source.json"
    }


def write_arrays(path: Path, array: NDArray[Any], blocks: bool) -> list[FileEntry]:
    """Write an array, and with `blocks` the checksums of its blocks; returns the entries of both files."""
    with NpyWriter(path, array.dtype, array.shape, blocks=blocks) as writer:
        writer.append(array)
    return [entry for entry in (writer.entry, writer.sums_entry) if entry is not None]


def write_graph(
    path: Path,
    num_nodes: int,
    edges: NDArray[np.int64],
    *,
    weights: NDArray[np.float32] | None = None,
    train: NDArray[Any] | None = None,
    wide_ids: bool = False,
    labels: NDArray[Any] | None = None,
    features: NDArray[np.float32] | None = None,
) -> GraphStore:
    """Store a graph of `edges` int64 [E, 2] (source, destination), in any order, duplicates kept."""
    features = np.zeros((num_nodes, 1), np.float32) if features is None else features
    path.mkdir(parents=True)
    order = np.lexsort((edges[:, 0], edges[:, 1]))
    dtype = np.dtype(np.int64) if wide_ids else id_dtype(num_nodes)
    indptr = np.cumsum([0, *np.bincount(edges[:, 1], minlength=num_nodes)]).astype(np.int64)
    arrays: dict[str, NDArray[Any]] = {
        "indptr": indptr,
        "indices": edges[order, 0].astype(dtype),
        "features": features,
        "labels": np.arange(num_nodes) % 3 - 1 if labels is None else labels,
        "train_ids": np.arange(num_nodes, dtype=dtype) if train is None else train.astype(dtype),
        "valid_ids": np.arange(0, num_nodes, 2, dtype=dtype),
        "test_ids": np.zeros(0, dtype),
    }
    if weights is not None:
        arrays["edge_weights"] = weights[order]
    meta = GraphMeta(
        num_nodes=num_nodes,
        num_edges=len(edges),
        num_features=features.shape[1],
        feature_dtype="float32",
        num_classes=3,
        multi_label=labels is not None and labels.ndim == 2,
        has_edge_weights=weights is not None,
        original_ids="dense",
        source="test",
    )
    files = tuple(
        entry
        for name, array in arrays.items()
        for entry in write_arrays(path / f"{name}.npy", array, name == "features")
    )
    write_manifest(path, graph_manifest(meta, files))
    return open_graph(path)


@pytest.fixture(scope="session")
def make_graph(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., GraphStore]:
    """`write_graph` into a fresh folder."""

    def make(num_nodes: int, edges: Any, **options: Any) -> GraphStore:
        array = np.asarray(edges, np.int64).reshape(-1, 2)
        return write_graph(tmp_path_factory.mktemp("graph") / "g", num_nodes, array, **options)

    return make


@pytest.fixture(scope="session")
def hub_graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    """300 nodes, weighted, some weights zero; ten hubs of in-degree over 100, thirty nodes without in-edges."""
    rng = np.random.default_rng(5)
    hubs = np.stack([rng.integers(0, 300, 1500), rng.integers(0, 10, 1500)], axis=1)
    others = np.stack([rng.integers(0, 300, 2500), rng.integers(0, 270, 2500)], axis=1)
    edges = np.unique(np.concatenate([hubs, others]), axis=0)
    weights = (rng.random(len(edges)) * (rng.random(len(edges)) > 0.2)).astype(np.float32)
    return make_graph(300, edges, weights=weights)
