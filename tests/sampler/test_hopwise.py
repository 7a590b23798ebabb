"""Hop by hop gives the payloads of item by item, byte for byte."""

from typing import Any

import pytest

from penstock.sampler import hopwise
from penstock.sampler.hopwise import sample_hopwise
from penstock.sampler.itemwise import sample_itemwise
from penstock.sampler.neighbors import SampleConfig, make_trace_meta
from penstock.storage.graph import GraphStore

METHODS: dict[str, dict[str, Any]] = {
    "uniform": {},
    "replace": {"replace": True},
    "labor": {"method": "labor"},
    "weighted": {"weighted": True},
    "weighted replace": {"weighted": True, "replace": True},
    "labor weighted": {"method": "labor", "weighted": True},
}


def _payloads(sample: Any, graph: GraphStore, options: dict[str, Any], memory: int, threads: int) -> list[bytes]:
    meta = make_trace_meta(graph, SampleConfig(batch_size=37, degrees=True, **options), num_epochs=2)
    found = sample(graph, meta, 1, meta.num_items, host_memory=memory, threads=threads)
    return [payload.tobytes() for payload in found]


@pytest.mark.parametrize("fanouts", [(4, 3), (-1, 50), (3, -1, 2)])
@pytest.mark.parametrize("method", METHODS)
def test_payloads_are_those_of_item_mode(hub_graph: GraphStore, method: str, fanouts: tuple[int, ...]) -> None:
    options = {**METHODS[method], "fanouts": fanouts}
    wanted = _payloads(sample_itemwise, hub_graph, options, 1 << 30, 1)
    assert len(set(wanted)) == len(wanted) == 2 * -(-300 // 37) - 1
    assert _payloads(sample_hopwise, hub_graph, options, 1 << 30, 2) == wanted
    assert _payloads(sample_hopwise, hub_graph, options, 1000, 3) == wanted  # groups of one item, hashes for tables
    assert _payloads(sample_itemwise, hub_graph, options, 1000, 3) == wanted


def test_chunks_of_destinations_change_nothing(hub_graph: GraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"fanouts": (4, 3)}
    wanted = _payloads(sample_itemwise, hub_graph, options, 1 << 30, 1)
    monkeypatch.setattr(hopwise, "_CHUNK", 7)
    assert _payloads(sample_hopwise, hub_graph, options, 1 << 30, 2) == wanted


def test_leaving_early_stops_the_threads(hub_graph: GraphStore) -> None:
    meta = make_trace_meta(hub_graph, SampleConfig(batch_size=5, fanouts=(4, 3)))
    payloads: Any = sample_itemwise(hub_graph, meta, 0, meta.num_items, host_memory=1 << 30, threads=2)
    next(payloads)
    payloads.close()
    assert list(payloads) == []
