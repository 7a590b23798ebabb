"""Which items of an epoch a replica gets, whatever the number of replicas.

An optimizer step takes a group of `group_items` consecutive items of an epoch; the last group of an epoch may be
smaller. Of each group, replica r of R gets the r-th run of group_items / R items. So the items of a step, and their
order, do not depend on R, and a run may go on with another R that divides the group.

"Own" numbers count a replica's items 0, 1, ... over all epochs; "whole" numbers count all items over all epochs, as a
single replica does. Randomness is keyed by whole numbers; traces, packs and feeds of a replica count its own.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """The share of replica `rank` of `replicas`; an epoch has `epoch_items` items in all.

    ValueError where groups cannot be dealt evenly, or nothing is left for this replica.
    """

    replicas: int
    rank: int
    group_items: int
    epoch_items: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.replicas or self.group_items < 1 or self.group_items % self.replicas:
            raise ValueError(
                f"groups of {self.group_items} items cannot be dealt evenly to {self.replicas} replicas (rank "
                f"{self.rank}); use a multiple of the replicas"
            )
        if self.own_per_epoch < 1:
            raise ValueError(
                f"an epoch has {self.epoch_items} items in groups of {self.group_items}: none is left for replica "
                f"{self.rank} of {self.replicas}; use fewer replicas, or a smaller batch size"
            )

    @property
    def share(self) -> int:
        """Items of a whole group that this replica gets."""
        return self.group_items // self.replicas

    @property
    def own_per_epoch(self) -> int:
        """Items of an epoch that this replica gets."""
        return self._own_of(self.epoch_items)

    def _own_of(self, items: int) -> int:
        """Own items among the first `items` of an epoch."""
        groups, rest = divmod(items, self.group_items)
        return groups * self.share + min(self.share, max(0, rest - self.rank * self.share))

    def own_before(self, whole: int) -> int:
        """How many own items come before item `whole`."""
        epoch, item = divmod(whole, self.epoch_items)
        return epoch * self.own_per_epoch + self._own_of(item)

    def whole(self, own: int) -> int:
        """Whole number of the replica's item `own`."""
        epoch, item = divmod(own, self.own_per_epoch)
        group, place = divmod(item, self.share)
        return epoch * self.epoch_items + group * self.group_items + self.rank * self.share + place
