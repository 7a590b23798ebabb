"""How much memory sampling takes, estimated before it is taken; none of it influences what is sampled."""

from penstock.storage.graph import GraphStore, id_dtype
from penstock.storage.trace import TraceMeta

_BYTES_PER_EDGE = 8 + 8 + 4  # position, id, local id
_BYTES_PER_DST = 3 * 8 + 4 + 4  # start, degree, offset, slot, local offset
_SKEW = 4  # fanout -1: sampled neighbours are of higher degree than the average node
_SHARE = 4  # part of the budget that tables may take, and that payloads of a window may


def topology_bytes(graph: GraphStore) -> int:
    """Bytes that random access to the topology wants resident."""
    edge_bytes = graph.id_dtype.itemsize + (4 if graph.meta.has_edge_weights else 0)
    return 8 * (graph.num_nodes + 1) + edge_bytes * graph.num_edges


def hop_bounds(graph: GraphStore, meta: TraceMeta) -> list[tuple[int, int]]:
    """Destinations and edges of each hop of one item, seeds first: bounds, or guesses where fanouts are -1."""
    average = graph.num_edges / max(1, graph.num_nodes)
    num_nodes = min(meta.batch_size, graph.num_nodes)
    bounds = []
    for fanout in reversed(meta.fanouts):
        per_node = fanout if fanout > 0 else _SKEW * average
        num_edges = int(num_nodes * per_node) if meta.replace else min(int(num_nodes * per_node), graph.num_edges)
        bounds.append((num_nodes, num_edges))
        num_nodes = min(num_nodes + num_edges, graph.num_nodes)
    return bounds


def item_bytes(graph: GraphStore, meta: TraceMeta) -> int:
    """Memory that one item in flight takes, without the table of `numbering`."""
    bounds = hop_bounds(graph, meta)
    num_inputs = min(sum(bounds[-1]), graph.num_nodes)
    return (
        _BYTES_PER_EDGE * max(num_edges for _, num_edges in bounds)
        + (8 + 8 * graph.meta.has_edge_weights + 8 * meta.weighted) * sum(e for _, e in bounds)  # and the payload's
        + _BYTES_PER_DST * bounds[-1][0]
        + 3 * id_dtype(graph.num_nodes).itemsize * num_inputs
    )


def table_fits(num_nodes: int, host_memory: int, threads: int) -> bool:
    """Whether one int32 per node and thread is a small part of the budget."""
    return 4 * num_nodes * threads <= host_memory // _SHARE


def num_workers(graph: GraphStore, meta: TraceMeta, host_memory: int, threads: int) -> int:
    """Items to have in flight: `threads`, or as many as the budget holds, at least one."""
    table = 4 * graph.num_nodes if table_fits(graph.num_nodes, host_memory, threads) else 0
    return max(1, min(threads, host_memory // (item_bytes(graph, meta) + table)))


def payload_share(host_memory: int) -> int:
    """Bytes that the payloads of one window may take."""
    return host_memory // _SHARE
