"""Packs against the feature table: every row that every step gathers must be the row it asked for."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.sampler.packer import write_packs
from penstock.sampler.row_source import read_row_error
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import checksum_file
from penstock.storage.pack import open_packset, read_pack_index
from penstock.storage.rows import RowFormat, encode_rows
from penstock.storage.trace import Trace, window_name

MEMORY = 4 << 20


def table_bytes(graph: GraphStore, dtype: str | None = None) -> NDArray[np.uint8]:
    values = np.array(graph.features)
    if dtype is not None:
        packed = RowFormat(dtype=dtype, width=graph.meta.num_features)  # type: ignore[arg-type]  # from a parameter
        values = np.ascontiguousarray(encode_rows(values, packed))
    return values.view(np.uint8).reshape(graph.num_nodes, -1)


def check(out: Path, graph: GraphStore, trace: Trace, replay: Any, dtype: str | None) -> None:
    table = table_bytes(graph, dtype)
    batches = replay(out, table, trace, laps=3)
    ids = [item.input_ids for item in trace.items()]
    assert len(batches) == 3 * len(ids)
    for step, batch in enumerate(batches):
        assert np.array_equal(batch, table[ids[step % len(ids)]])


@pytest.mark.parametrize("policy", ["belady", "static", "none"])
@pytest.mark.parametrize("host", [46_496, 50_000, 1 << 20])
@pytest.mark.parametrize("device", [0, 3000])
def test_packs_serve_every_row(
    tiny_graph: GraphStore,
    small_trace: Trace,
    make_plan: Any,
    replay: Any,
    tmp_path: Path,
    policy: str,
    host: int,
    device: int,
) -> None:
    plan = make_plan(
        policy=policy, host=host + (10_000 if host < 1 << 20 else 0) * (policy == "none" or device == 0), device=device
    )
    meta = write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=MEMORY)
    assert open_packset(tmp_path / "packs") == meta == plan.meta
    check(tmp_path / "packs", tiny_graph, small_trace, replay, None)
    sizes = [sum(read_pack_index(tmp_path / "packs", w).bytes) for w in range(meta.num_windows)]
    assert sum(sizes) == plan.summary.pack_bytes


def test_progress_grows_up_to_all_of_it(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    seen: list[int] = []

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        assert (stage, unit) == ("pack", "bytes") and done <= total
        seen.append(done)

    plan = make_plan(host=50_000)
    write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=MEMORY, progress=show)
    assert seen == sorted(seen) and seen[-1] == plan.summary.pack_bytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_packs_of_other_dtypes_hold_encoded_rows_and_tell_the_error(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, replay: Any, tmp_path: Path, dtype: str
) -> None:
    plan = make_plan(row_dtype=dtype, policy="none")
    write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=MEMORY)
    check(tmp_path / "packs", tiny_graph, small_trace, replay, dtype)
    error = read_row_error(tmp_path / "packs")
    assert error is not None and 0 < error.mean_abs < error.max_abs < 0.1


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: checksum_file(path) for path in sorted(folder.iterdir())}


def test_bytes_do_not_depend_on_memory(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan = make_plan(host=50_000)
    for name, memory in (("small", 1_300_000), ("large", 64 << 20)):
        write_packs(plan, tiny_graph, small_trace, tmp_path / name, host_memory=memory)
    assert files_of(tmp_path / "small") == files_of(tmp_path / "large")


def test_finished_windows_are_not_redone(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan, out = make_plan(host=50_000), tmp_path / "packs"
    write_packs(plan, tiny_graph, small_trace, out, host_memory=MEMORY)
    before = files_of(out)
    for name in ("manifest.json", window_name(1, "json"), window_name(1, "pack")):
        (out / name).unlink()
    kept = (out / window_name(0, "pack")).stat()
    write_packs(plan, tiny_graph, small_trace, out, host_memory=MEMORY)
    assert files_of(out) == before
    assert (out / window_name(0, "pack")).stat().st_mtime_ns == kept.st_mtime_ns


def test_packs_of_another_plan_are_refused(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    write_packs(make_plan(host=50_000), tiny_graph, small_trace, tmp_path / "packs", host_memory=MEMORY)
    with pytest.raises(DataError, match="host_slots"):
        write_packs(make_plan(host=55_000), tiny_graph, small_trace, tmp_path / "packs", host_memory=MEMORY)


def test_too_little_memory_is_refused_with_the_smallest_that_does(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan = make_plan(host=50_000)
    with pytest.raises(DoesNotFit, match="--host-memory") as caught:
        write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=10_000)
    enough = int(str(caught.value).split("--host-memory ")[1].split()[0])
    write_packs(plan, tiny_graph, small_trace, tmp_path / "packs", host_memory=enough)


def test_a_value_beyond_float16_is_refused(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan = make_plan(host=40_000, row_dtype="float16")
    shutil.copytree(tiny_graph.path, tmp_path / "graph")
    features = np.load(tmp_path / "graph" / "features.npy", mmap_mode="r+")
    features[:, 3] = 1e6
    features.flush()
    graph = GraphStore(tmp_path / "graph", tiny_graph.manifest, tiny_graph.meta)
    bad = type(plan.table)(path=graph.feature_path, offset=4096, num_rows=400, row_bytes=80)
    with pytest.raises(DataError, match="1e\\+06.*float16"):
        write_packs(
            type(plan)(**{f: getattr(plan, f) for f in plan.__slots__} | {"table": bad}),
            graph,
            small_trace,
            tmp_path / "packs",
            host_memory=MEMORY,
        )
