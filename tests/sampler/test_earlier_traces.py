"""Traces of an earlier release, whose items say less: read as they are, and sampled anew where that is used now."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.engine.memory_feed import open_memory_feed
from penstock.sampler.estimate import DiskRates
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.storage.budget import MIB, Budgets
from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.items import encode_item, payload_bytes
from penstock.storage.manifest import read_json, write_json
from penstock.storage.trace import Trace, open_trace, window_name
from penstock.storage.trace_writer import TraceWindowWriter

RATES = DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=1e5)


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., GraphStore]) -> GraphStore:
    rng = np.random.default_rng(0)
    edges = np.concatenate([rng.integers(0, 60, (200, 2)), np.repeat(np.arange(0, 60, 3), 2).reshape(-1, 2)])
    return make_graph(60, edges, train=np.arange(40), weights=rng.random(len(edges)).astype(np.float32))


def _sample(graph: GraphStore, out: Path, config: SampleConfig) -> Trace:
    return sample_trace(graph, out, config, host_memory=MIB, threads=1)


def _write_as_version_1(trace: Trace) -> None:
    """Write a trace again as the release before checksums of payloads did."""
    windows = [window.items for window in trace.windows()]
    for number, items in enumerate(windows):
        with TraceWindowWriter(trace.path, trace.meta, number) as writer:
            for item in items:
                blocks = tuple(replace(block, draw_weights=None) for block in item.blocks)
                old = replace(item, loops=None, blocks=blocks)
                payload = np.empty(payload_bytes(old), np.uint8)
                encode_item(old, payload)
                writer.append(payload)
        path = trace.path / window_name(number, "json")
        write_json(path, {k: v for k, v in read_json(path).items() if k not in ("payload_xxh3", "ids_xxh3")})
    for name in ("trace.json", "manifest.json"):
        write_json(trace.path / name, {**read_json(trace.path / name), "version": 1})


@pytest.mark.parametrize("is_published", [True, False])
@pytest.mark.parametrize(
    ("options", "lacks"), [({"degrees": True}, "self-loops"), ({"weighted": True}, "what each draw by weight counts")]
)
def test_what_items_lack_is_sampled_anew(
    graph: GraphStore,
    tmp_path: Path,
    folder_bytes: Callable[[Path], dict[str, bytes]],
    options: dict[str, Any],
    lacks: str,
    is_published: bool,
) -> None:
    config = SampleConfig(fanouts=(3, 3), batch_size=10, window_items=2, **options)
    trace = _sample(graph, tmp_path / "t", config)
    today = folder_bytes(trace.path)
    _write_as_version_1(trace)
    old = open_trace(trace.path)
    assert all(item.loops is None for item in old.items()) and folder_bytes(trace.path) != today
    with pytest.raises(FormatError, match=f"an earlier release, .* do not say .*{lacks}.*; sample it again"):
        open_memory_feed(graph, old, start_step=0, stop_step=1)
    budgets = Budgets(device_bytes=0, host_bytes=MIB, disk_bytes=1 << 30)
    with pytest.raises(FormatError, match="an earlier release"):
        plan_packs(graph, old, PlanConfig(), budgets, disk_rates=RATES, scratch=tmp_path / "plan")
    if not is_published:
        (trace.path / "manifest.json").unlink()
    again = _sample(graph, trace.path, config)
    written = folder_bytes(trace.path)
    assert {name: data for name, data in written.items() if name != "trace.json"} == {
        name: data for name, data in today.items() if name != "trace.json"
    }
    with open_memory_feed(graph, again, start_step=0, stop_step=4) as feed:
        knows = [batch.blocks[0].src_loops is not None for batch in feed]
    assert len(knows) == 4 and any(knows) == ("degrees" in options)


def test_items_that_lack_nothing_stay(graph: GraphStore, tmp_path: Path) -> None:
    config = SampleConfig(fanouts=(3, 3), batch_size=10)
    trace = _sample(graph, tmp_path / "t", config)
    _write_as_version_1(trace)
    before = {path.name: path.stat().st_mtime_ns for path in trace.path.iterdir()}
    again = _sample(graph, trace.path, config)
    assert {path.name: path.stat().st_mtime_ns for path in trace.path.iterdir()} == before
    with open_memory_feed(graph, again, start_step=0, stop_step=4) as feed:
        assert len(list(feed)) == 4
