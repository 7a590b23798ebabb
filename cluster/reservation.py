"""Room for all ranks at once: a placement group, which a cluster that has no room yet is waited for with."""

import logging
import time
from contextlib import suppress

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from penstock.cluster.head import HeadLost, ask
from penstock.cluster.placement import Placement
from penstock.engine.chunked.backend import NoRoomYet, Poll

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
_NEWS_S = 5.0  # a wait for room that is longer is told


def reserve(placement: Placement, num_ranks: int, wait_s: float, poll: Poll) -> PlacementGroup:
    """Make the placement group; NoRoomYet where the cluster has no room in time. What `poll` raises ends the wait."""
    bundles, strategy = list(placement.bundles), placement.strategy
    group: PlacementGroup = ask(lambda: placement_group(bundles, strategy=strategy, name="penstock"))
    try:
        _await_room(group, placement, num_ranks, wait_s, poll)
    except BaseException:
        give_back(group)
        raise
    logger.info("%d bundles with strategy %s: %s", len(bundles), strategy, placement.reason)
    return group


def _await_room(group: PlacementGroup, placement: Placement, num_ranks: int, wait_s: float, poll: Poll) -> None:
    bundles, strategy = placement.bundles, placement.strategy
    if not _comes(group, min(wait_s, _NEWS_S), poll):
        each = "" if len(bundles) == num_ranks else f" in {len(bundles)} bundles"
        wanted = f"room for {num_ranks} ranks{each} of {bundles[0]} with strategy={strategy}"
        logger.warning("waiting for %s, for %.0f s at most (cluster.wait_s): %s", wanted, wait_s, placement.reason)
        if not _comes(group, wait_s - _NEWS_S, poll):
            found: dict[str, float] = ask(ray.available_resources)
            free = {name: found.get(name, 0.0) for name in ("CPU", "GPU", *bundles[0])}
            raise NoRoomYet(
                f"no {wanted} within {wait_s:.0f} s ({placement.reason}); free in the cluster: {free}; run again when "
                "there is, add nodes, raise cluster.wait_s for nodes that an autoscaler starts, or lower replicas, "
                "threads, stages or parts"
            )


def _comes(group: PlacementGroup, wait_s: float, poll: Poll) -> bool:
    """Whether there is room in time; looks now and then, since `ask` is for short calls."""
    ends = time.monotonic() + wait_s
    while not ask(lambda: group.wait(_LOOK_S)):
        poll()
        if time.monotonic() >= ends:
            return False
        time.sleep(_LOOK_S)
    return True


def give_back(group: PlacementGroup) -> None:
    """Let others have the room."""
    with suppress(HeadLost):  # then nobody keeps it
        ask(lambda: remove_placement_group(group))
