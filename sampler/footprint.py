"""How much memory sampling takes, estimated before it is taken; none of it influences what is sampled."""

from collections.abc import Sequence

from penstock.storage.graph import GraphStore, id_dtype
from penstock.storage.trace import TraceMeta

_BYTES_PER_DST = 3 * 8 + 4  # start, degree, offset, slot
_SKEW = 4  # fanout -1: sampled neighbours are of higher degree than the average node
_SLACK = 1.25  # arrays that grow take a quarter more than they need
_LEAST = 1 << 20
_SHARE = 4  # part of the budget that tables may take, and that payloads of a window may


def items_memory(graph: GraphStore, host_memory: int, threads: int) -> int:
    """Bytes for items in flight, besides a table per thread; enough for small items however little is given."""
    return max(_LEAST, host_memory - threads * table_bytes(graph, host_memory, threads))


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


def needed_bytes(graph: GraphStore, meta: TraceMeta, hops: Sequence[tuple[int, int]], *, table: bool) -> int:
    """Memory that one item takes which has these destinations and edges per hop, seeds first; without its `table`."""
    id_bytes = id_dtype(graph.num_nodes).itemsize
    weight_bytes = 4 * graph.meta.has_edge_weights + 4 * meta.weighted  # weights, and what weighted draws are scaled by
    label_bytes = graph.meta.num_classes if graph.meta.multi_label else 4
    num_inputs = min(sum(hops[-1]), graph.num_nodes)
    most_edges = max(num_edges for _, num_edges in hops)
    blocks = sum(4 * (num_dst + 1) + (4 + weight_bytes) * num_edges for num_dst, num_edges in hops)
    payload = (
        blocks
        + num_inputs * (id_bytes + (8 if meta.degrees else 0))  # degrees and self-loops
        + label_bytes * min(meta.batch_size, graph.num_nodes)
        + 4096
    )
    drawing = (8 + graph.id_dtype.itemsize) * most_edges + _BYTES_PER_DST * num_inputs
    hashed = 0 if table else 4 * num_inputs * (id_bytes + 4)
    return int(_SLACK * (blocks + drawing + num_inputs * (id_bytes + 4) + payload)) + hashed


def item_bytes(graph: GraphStore, meta: TraceMeta) -> int:
    """Memory that one item in flight takes, without the table of `numbering`: a bound, or a guess for fanout -1."""
    return needed_bytes(graph, meta, hop_bounds(graph, meta), table=True)


def with_later_hops(graph: GraphStore, meta: TraceMeta, hops: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The hops of an item whose first ones are known, bounds for those that follow."""
    found = list(hops)
    for fanout in list(reversed(meta.fanouts))[len(hops) :]:
        num_nodes = min(sum(found[-1]), graph.num_nodes)
        num_edges = num_nodes * fanout if fanout > 0 else graph.num_edges
        found.append((num_nodes, num_edges if meta.replace else min(num_edges, graph.num_edges)))
    return found


def table_fits(num_nodes: int, host_memory: int, threads: int) -> bool:
    """Whether one int32 per node and thread is a small part of the budget."""
    return 4 * num_nodes * threads <= host_memory // _SHARE


def table_bytes(graph: GraphStore, host_memory: int, threads: int) -> int:
    """What `numbering` takes per thread besides items: a table, or nothing where none fits."""
    return 4 * graph.num_nodes if table_fits(graph.num_nodes, host_memory, threads) else 0


def num_workers(graph: GraphStore, meta: TraceMeta, host_memory: int, threads: int) -> int:
    """Items to have in flight: `threads`, or as many as the budget holds, at least one."""
    table = table_bytes(graph, host_memory, threads)
    return max(1, min(threads, host_memory // (item_bytes(graph, meta) + table)))


def payload_share(host_memory: int) -> int:
    """Bytes that the payloads of one window may take."""
    return host_memory // _SHARE
