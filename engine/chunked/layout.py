"""Who is who: ranks in replicas of a grid of parts times stages, and which layers a stage has."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Layout:
    """Ranks 0 .. replicas * parts * stages - 1; a rank has its part's nodes and its stage's layers.

    Rank `(replica * parts + part) * stages + stage`: the ranks of a replica are consecutive. Replicas share nothing but
    what they average at an optimizer step. ValueError where a number is below one.
    """

    stages: int
    parts: int
    replicas: int = 1

    def __post_init__(self) -> None:
        if min(self.stages, self.parts, self.replicas) < 1:
            raise ValueError(f"{self} has a number below 1; stages, parts and replicas must all be at least 1")

    @property
    def num_ranks(self) -> int:
        return self.replicas * self.grid_size

    @property
    def grid_size(self) -> int:
        """The ranks of one replica."""
        return self.stages * self.parts

    def rank(self, part: int, stage: int, replica: int = 0) -> int:
        """Number the rank of a part and a stage."""
        assert 0 <= part < self.parts and 0 <= stage < self.stages, (part, stage, self)
        assert 0 <= replica < self.replicas, (replica, self)
        return (replica * self.parts + part) * self.stages + stage

    def replica_of(self, rank: int) -> int:
        return rank // self.grid_size

    def part_of(self, rank: int) -> int:
        return rank // self.stages % self.parts

    def stage_of(self, rank: int) -> int:
        return rank % self.stages

    def ranks_of(self, replica: int) -> range:
        """All ranks of a replica."""
        return range(replica * self.grid_size, (replica + 1) * self.grid_size)

    def same_stage(self, rank: int) -> tuple[int, ...]:
        """The ranks of all parts at this rank's stage in its replica, itself among them, in the order of the parts."""
        stage, replica = self.stage_of(rank), self.replica_of(rank)
        return tuple(self.rank(part, stage, replica) for part in range(self.parts))

    def same_place(self, rank: int) -> tuple[int, ...]:
        """The ranks of this part and stage in all replicas, itself among them, in the order of the replicas."""
        part, stage = self.part_of(rank), self.stage_of(rank)
        return tuple(self.rank(part, stage, replica) for replica in range(self.replicas))

    def prev_rank(self, rank: int) -> int | None:
        """The rank of the same part one stage earlier, which sends forward to this one; None at the first stage."""
        return rank - 1 if self.stage_of(rank) > 0 else None

    def next_rank(self, rank: int) -> int | None:
        """The rank of the same part one stage later; None at the last stage."""
        return rank + 1 if self.stage_of(rank) < self.stages - 1 else None

    def peers(self, rank: int) -> tuple[int, ...]:
        """The ranks of the other parts at the same stage of the same replica, in the order of the parts."""
        return tuple(other for other in self.same_stage(rank) if other != rank)

    def siblings(self, rank: int) -> tuple[int, ...]:
        """The ranks of the same part and stage in the other replicas, in the order of the replicas."""
        return tuple(other for other in self.same_place(rank) if other != rank)


def split_stages(costs: Sequence[float], stages: int) -> tuple[range, ...]:
    """Cut units into consecutive, non-empty stages so that the dearest stage is as cheap as can be.

    `costs` has the seconds (or any measure) of unit 0, `enter`, and of the hidden layers after it; the caller adds the
    head's to the last. Equally good cuts are told apart by the squares of their costs, then by the longer early stage,
    so every process finds the same. O(stages * units^2). ValueError where there are more stages than units.
    """
    num_units = len(costs)
    if not 1 <= stages <= num_units:
        raise ValueError(
            f"stages={stages} cannot share {num_units} units (`enter` and {num_units - 1} hidden layers); "
            f"set stages between 1 and {num_units}, or use more layers or parts"
        )
    sums = [0.0, *accumulate(costs)]
    # best[n]: (dearest, sum of squares, -cut) of the first n units in so many stages, the last of which starts at cut
    best = {0: (0.0, 0.0, 0)}
    rows = []
    for _ in range(stages):
        best = {
            stop: min(
                (max(best[cut][0], (cost := sums[stop] - sums[cut])), best[cut][1] + cost * cost, -cut)
                for cut in best
                if cut < stop
            )
            for stop in range(min(best) + 1, num_units + 1)
        }
        rows.append(best)
    bounds = [num_units]
    for row in reversed(rows):
        bounds.append(-row[bounds[-1]][2])
    return tuple(range(start, stop) for start, stop in pairwise(reversed(bounds)))
