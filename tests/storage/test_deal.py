"""Every item goes to exactly one replica, in the order in which one replica would have it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.storage.deal import Deal


@given(replicas=st.integers(1, 5), share=st.integers(1, 4), epoch_items=st.integers(1, 60), epochs=st.integers(1, 3))
def test_items_are_dealt_once_and_in_order(replicas: int, share: int, epoch_items: int, epochs: int) -> None:
    group = replicas * share
    if epoch_items <= (replicas - 1) * share:
        with pytest.raises(ValueError, match="none is left for replica"):
            Deal(replicas=replicas, rank=replicas - 1, group_items=group, epoch_items=epoch_items)
        return
    dealt: list[int] = []
    for rank in range(replicas):
        deal = Deal(replicas=replicas, rank=rank, group_items=group, epoch_items=epoch_items)
        own = [deal.whole(number) for number in range(epochs * deal.own_per_epoch)]
        assert own == sorted(own)
        assert [deal.own_before(whole) for whole in own] == list(range(len(own)))
        assert deal.own_before(epochs * epoch_items) == len(own)
        for whole in own:  # whose turn it is within the group
            assert whole % epoch_items % group // share == rank
        dealt += own
    assert sorted(dealt) == list(range(epochs * epoch_items))


def test_a_group_that_cannot_be_dealt_evenly_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 3 items cannot be dealt evenly to 2 replicas"):
        Deal(replicas=2, rank=0, group_items=3, epoch_items=10)
