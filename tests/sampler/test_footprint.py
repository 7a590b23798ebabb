"""Estimates of memory: they bound what is sampled, and they decide how much is in flight."""

from penstock.sampler.footprint import hop_bounds, item_bytes, num_workers, table_fits
from penstock.sampler.itemwise import make_numbering, sample_itemwise
from penstock.sampler.neighbors import SampleConfig, make_trace_meta
from penstock.sampler.numbering import HashNumbering, TableNumbering
from penstock.storage.graph import GraphStore
from penstock.storage.items import decode_item


def test_bounds_hold_for_every_item(hub_graph: GraphStore) -> None:
    for replace in (False, True):
        meta = make_trace_meta(hub_graph, SampleConfig(fanouts=(9, 4, 3), batch_size=20, replace=replace))
        bounds = hop_bounds(hub_graph, meta)
        for payload in sample_itemwise(hub_graph, meta, 0, meta.num_items, host_memory=1 << 30, threads=1):
            assert len(payload) <= item_bytes(hub_graph, meta)
            for block, (num_dst, num_edges) in zip(reversed(decode_item(payload).blocks), bounds, strict=True):
                assert block.num_dst <= num_dst and len(block.indices) <= num_edges


def test_small_budgets_mean_fewer_workers_and_hash_tables(hub_graph: GraphStore) -> None:
    meta = make_trace_meta(hub_graph, SampleConfig(fanouts=(9, 4), batch_size=20))
    one = item_bytes(hub_graph, meta)
    assert num_workers(hub_graph, meta, 1 << 30, threads=8) == 8
    assert num_workers(hub_graph, meta, 3 * (one + 4 * 300), threads=8) == 3
    assert num_workers(hub_graph, meta, 1, threads=8) == 1
    assert table_fits(300, 4 * 4 * 300 * 2, threads=2) and not table_fits(300, 4 * 4 * 300 * 2, threads=3)
    assert isinstance(make_numbering(hub_graph, host_memory=1 << 30, threads=2), TableNumbering)
    assert isinstance(make_numbering(hub_graph, host_memory=1000, threads=2), HashNumbering)
