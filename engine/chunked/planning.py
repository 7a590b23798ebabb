"""The plans of an epoch as configured: every replica's own order of chunks, proven sound alone and together."""

from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import EpochPlan, chunk_order, plan_epoch
from penstock.engine.chunked.validate import validate_replicas


def plan_replica(
    layout: Layout,
    config: ChunkedConfig,
    num_chunks: int,
    *,
    seed: int,
    epoch: int,
    recompute: bool,
    replica: int = 0,
) -> EpochPlan:
    """Plan what one replica does in an epoch of a run with this `seed`."""
    order = chunk_order(seed, epoch, num_chunks, config.cycle_orders, shuffle=config.shuffle_chunks, replica=replica)
    return plan_epoch(
        layout,
        epoch=epoch,
        order=order,
        updates=config.updates_per_epoch,
        gradient_mode=config.gradient_mode,
        recompute=recompute,
        defer_weights=config.defer_weights,
        replica=replica,
    )


def plan_replicas(
    layout: Layout, config: ChunkedConfig, num_chunks: int, *, seed: int, epoch: int, recompute: bool
) -> list[EpochPlan]:
    """Plan an epoch of all replicas. ScheduleError where the plans are not sound, which is a bug."""
    plans = [
        plan_replica(layout, config, num_chunks, seed=seed, epoch=epoch, recompute=recompute, replica=replica)
        for replica in range(layout.replicas)
    ]
    validate_replicas(plans, layout, period=config.period)
    return plans
