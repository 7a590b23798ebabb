import json

import numpy as np
import pytest

from penstock.engine.supervision.stragglers import RankTimes, StragglerWatch, find_straggler


def times(*busy: float, **waits: float) -> list[RankTimes]:
    """Ranks that were busy for so long; the last one waited for `waits` meanwhile."""
    found = [RankTimes(rank=rank, host="a", busy_s=busy_s) for rank, busy_s in enumerate(busy[:-1])]
    return [*found, RankTimes(rank=len(busy) - 1, host="b", busy_s=busy[-1], waits=waits)]


@pytest.mark.parametrize("busy", [(), (5.0,), (5.0, 5.4), (5.0, 5.0, 5.0), (0.0, 0.0), (1.0, 10.0, 11.0)])
def test_ranks_that_do_about_the_same_have_no_straggler(busy: tuple[float, ...]) -> None:
    assert find_straggler(times(*busy) if busy else []) is None


def test_the_slowest_is_told_with_the_cause_that_it_has_more_of_than_others() -> None:
    found = find_straggler([*times(8.0, 10.0, 9.0), RankTimes(rank=3, host="c", busy_s=20.0, waits={"disk": 9.0})])
    assert found is not None and (found.rank, found.host, found.cause) == (3, "c", "disk")
    assert found.excess_s == pytest.approx(10.5) and found.ratio == pytest.approx(20 / 9.5)
    assert found.cause_excess_s == pytest.approx(9.0)
    assert str(found) == (
        "rank 3 on c is the slowest: busy for 20.0 s, 2.11 times the median rank (10.5 s more), "
        "mostly at disk (9.0 s more)"
    )
    assert json.loads(json.dumps(found.to_json()))["cause"] == "disk"


def test_what_waits_for_nothing_computes() -> None:
    found = find_straggler(times(10.0, 20.0, disk=2.0))
    assert found is not None and (found.rank, found.cause, found.ratio) == (1, "compute", 2.0)
    assert found.cause_excess_s == pytest.approx(8.0)


def test_a_wait_that_all_have_is_no_cause() -> None:
    same = [RankTimes(rank=rank, host="a", busy_s=10.0, waits={"feeder": 9.0}) for rank in range(3)]
    found = find_straggler([*same, RankTimes(rank=3, host="a", busy_s=15.0, waits={"feeder": 9.0})])
    assert found is not None and found.cause == "compute" and found.cause_excess_s == pytest.approx(5.0)


def watch_ranks(slower: float, windows: int, seed: int, noise: float = 0.3) -> StragglerWatch:
    """Four ranks that differ by so much noise in every window; the last one is slower by a factor."""
    rng, found = np.random.default_rng(seed), StragglerWatch()
    for _ in range(windows):
        busy = 1.0 + noise * rng.random(4)
        busy[-1] *= slower
        found.add(times(*busy.tolist()))
    return found


def test_noise_names_nobody() -> None:
    short = [watch_ranks(1.0, windows, seed).find() for seed in range(200) for windows in (1, 2, 3, 4, 8)]
    alone = [find_straggler(times(*(1.0 + 0.3 * np.random.default_rng(n).random(4)).tolist())) for n in range(200)]
    assert sum(found is not None for found in alone) > 40, "one window would name somebody"
    assert sum(found is not None for found in short) <= 10


def test_who_is_slower_again_and_again_is_named() -> None:
    for seed in range(20):
        found = watch_ranks(1.3, 30, seed).find()
        assert found is not None and (found.rank, found.host) == (3, "b") and 1.15 < found.ratio < 1.45


def test_too_little_says_nothing_and_another_group_begins_anew() -> None:
    watch = StragglerWatch()
    for _ in range(3):
        watch.add(times(1.0, 1.0, 9.0))
    assert watch.find() is None
    watch.add(times(1.0, 1.0, 9.0))
    assert watch.find() is not None
    watch.add(times(1.0, 9.0))
    assert watch.find() is None
