"""The default of `--host-memory`, and whether one that is given can fit: the container's limit less what is fixed.

Nothing has been sampled yet, so what a step computes is bounded by fanouts and batch size; once it is known,
`sampled_memory` predicts the whole process.
"""

import torch

from penstock.config import RunConfig
from penstock.engine.activations import step_bytes
from penstock.engine.models import build_model
from penstock.process_memory import PRODUCER, RANK, STATE_COPIES, WAITING, WAITING_PART
from penstock.sampler.footprint import hop_bounds, topology_bytes
from penstock.sampler.neighbors import make_trace_meta
from penstock.storage.budget import MIB, default_host_bytes, format_bytes
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore

_LEAST = 16 * MIB  # less holds no buffers


def _computing_bytes(config: RunConfig, graph: GraphStore) -> int:
    """Weights with what an optimizer keeps, and what a step on the largest item that fanouts allow holds."""
    meta = graph.meta
    if not len(graph.split_ids("train")):
        return 0
    with torch.random.fork_rng([]):
        model = build_model(config.model, meta.num_features, meta.num_classes)
    trace = make_trace_meta(graph, config.sampler.model_copy(update={"window_items": 1}))
    blocks = [(min(dst + edges, graph.num_nodes), dst, edges) for dst, edges in reversed(hop_bounds(graph, trace))]
    num_weights = meta.has_edge_weights * (1 + config.sampler.weighted)
    weights = STATE_COPIES * sum(p.numel() * p.element_size() for p in model.parameters())
    if torch.device(config.train.device).type != "cpu":
        return weights
    step = step_bytes(
        model,
        blocks,
        meta.num_features,
        meta.num_classes,
        multi_label=meta.multi_label,
        train=True,
        num_weights=num_weights,
    )
    return weights + WAITING * step


def fixed_bytes(config: RunConfig, graph: GraphStore, process_bytes: int) -> int:
    """What processes of a run take besides `--host-memory`; `process_bytes` is what this one has when it is empty."""
    if config.mode == "chunked":
        chunked = config.chunked
        ranks = (chunked.devices or chunked.stages * chunked.parts) * config.cluster.replicas
        return process_bytes + (0 if chunked.backend == "threads" else RANK * ranks)
    fixed = process_bytes + _computing_bytes(config, graph)
    if config.feed == "memory":
        fixed += graph.num_nodes * graph.row_format.row_bytes
    if config.plan.mode == "rolling":
        fixed += PRODUCER + topology_bytes(graph)
    return fixed


def _may_fit(config: RunConfig, graph: GraphStore, process_bytes: int, limit: int) -> bool:
    """Whether a given budget is not certain to exceed the limit. Bounds on a step say too much to refuse by, and what
    is kept for evaluation, or is more than the features, need not be used; the plan knows it exactly."""
    given = config.budgets.host_memory or 0
    used = int(given * (1 - config.evaluate.memory_share))
    return process_bytes + (_LEAST if graph.feature_bytes < given else used) <= limit


def choose_host_bytes(config: RunConfig, graph: GraphStore, process_bytes: int, limit: int) -> int:
    """`--host-memory` as given, or what fits this container or machine of `limit` bytes; DoesNotFit where it cannot."""
    given = config.budgets.host_memory
    if given is not None and _may_fit(config, graph, process_bytes, limit):
        return given
    fixed = fixed_bytes(config, graph, process_bytes)
    chosen = default_host_bytes(fixed) if given is None else limit - fixed
    if config.mode == "chunked":
        chosen = chosen * WAITING_PART // (WAITING_PART + 1)
    if given is None and chosen >= _LEAST:
        return chosen
    needs = f"the process takes {format_bytes(fixed)} besides (interpreter, libraries, model, what a step computes)"
    if chosen < _LEAST:
        wanted = fixed + (given or 256 * MIB)
        raise DoesNotFit(
            f"this container or machine has {format_bytes(limit)}, {needs}; give it {wanted} bytes or more, or use a "
            "smaller batch size, smaller fanouts or a smaller model"
        )
    raise DoesNotFit(
        f"--host-memory {format_bytes(given or 0)} does not fit this container or machine of {format_bytes(limit)}: "
        f"{needs}; use --host-memory {chosen} or less, or give it {fixed + (given or 0)} bytes",
        host_bytes=chosen,
    )
