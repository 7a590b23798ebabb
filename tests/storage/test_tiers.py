from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from penstock.engine.device_tier import DeviceTier
from penstock.storage.graph import GraphStore
from penstock.storage.rows import ROW_DTYPES, RowDtype, RowFormat, decode_rows, encode_rows
from penstock.storage.table import StoredRows
from penstock.storage.tiers import HostTier, RowPlace, Tier, as_words, gather_table, restore, row_words


def encoded(count: int, row_format: RowFormat, seed: int = 0) -> NDArray[np.uint8]:
    values = np.random.default_rng(seed).normal(size=(count, row_format.width)).astype(np.float32)
    return np.ascontiguousarray(encode_rows(values, row_format)).view(np.uint8).reshape(count, row_format.row_bytes)


@pytest.mark.parametrize("dtype", ROW_DTYPES)
class TierContract:
    """What holds for every tier; a subclass makes one."""

    def make(self, num_slots: int, row_format: RowFormat) -> Tier:
        raise NotImplementedError

    def test_filled_rows_are_read_back_decoded(self, dtype: RowDtype) -> None:
        row_format = RowFormat(dtype=dtype, width=7)
        tier, rows = self.make(9, row_format), encoded(4, row_format)
        slots = np.array([8, 0, 3, 5])
        tier.fill(slots, rows)
        np.testing.assert_array_equal(tier.read(slots), decode_rows(rows, row_format))
        np.testing.assert_array_equal(tier.read(slots[[2, 2, 0]]), decode_rows(rows[[2, 2, 0]], row_format))

    def test_a_second_filling_replaces_and_leaves_the_rest(self, dtype: RowDtype) -> None:
        row_format = RowFormat(dtype=dtype, width=5)
        tier, first, second = self.make(6, row_format), encoded(6, row_format, 1), encoded(2, row_format, 2)
        tier.fill(np.arange(6), first)
        tier.fill(np.array([4, 1]), second)
        expected = first.copy()
        expected[[4, 1]] = second
        np.testing.assert_array_equal(tier.read(np.arange(6)), decode_rows(expected, row_format))

    def test_a_tier_may_have_no_slots(self, dtype: RowDtype) -> None:
        row_format = RowFormat(dtype=dtype, width=3)
        tier = self.make(0, row_format)
        tier.fill(np.empty(0, np.int64), encoded(0, row_format))
        assert tier.read(np.empty(0, np.int64)).shape == (0, 3)
        with pytest.raises(ValueError, match="tier's 0"):
            tier.read(np.array([0]))

    @pytest.mark.parametrize("slot", [-1, 4])
    def test_a_slot_that_does_not_exist_is_refused(self, dtype: RowDtype, slot: int) -> None:
        row_format = RowFormat(dtype=dtype, width=3)
        tier = self.make(4, row_format)
        with pytest.raises(ValueError, match="not all within the tier's 4"):
            tier.fill(np.array([0, slot]), encoded(2, row_format))
        with pytest.raises(ValueError, match="not all within the tier's 4"):
            tier.read(np.array([slot]))

    def test_residents_come_from_the_feature_table(self, dtype: RowDtype, tiny_graph: GraphStore) -> None:
        row_format = RowFormat(dtype=dtype, width=20)
        tier = self.make(50, row_format)
        residents = np.random.default_rng(3).permutation(tiny_graph.num_nodes)[:50]
        residents[[4, 40]] = -1
        before = tier.read(np.array([4, 40]))
        assert restore(tier, residents, StoredRows(tiny_graph)) > 0
        held = np.flatnonzero(residents >= 0)
        rows = encode_rows(np.array(tiny_graph.features[residents[held]]), row_format)
        np.testing.assert_array_equal(tier.read(held), decode_rows(rows, row_format))
        np.testing.assert_array_equal(tier.read(np.array([4, 40])), before)


class TestHostTier(TierContract):
    def make(self, num_slots: int, row_format: RowFormat) -> HostTier:
        return HostTier(num_slots, row_format)


class TestDeviceTier(TierContract):
    def make(self, num_slots: int, row_format: RowFormat) -> DeviceTier:
        return DeviceTier(num_slots, row_format, torch.device("cpu"))


def place_of(rows: NDArray[np.uint8], row_format: RowFormat) -> RowPlace:
    words = as_words(rows.reshape(-1), row_format)
    return RowPlace(words=words, num_private=len(rows), rows_at=0, shared_at=np.empty(0, np.int64))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_the_host_tier_gathers_admits_and_wraps(dtype: RowDtype) -> None:
    row_format = RowFormat(dtype=dtype, width=6)
    tier, held, extent = HostTier(5, row_format), encoded(5, row_format, 1), encoded(3, row_format, 2)
    tier.fill(np.arange(5), held)
    place = place_of(extent, row_format)
    codes = np.array([7, 0, 4, 5, 5, 2], np.int32)
    out = np.empty((6, 6), np.float32)
    tier.gather(codes, place, out, threads=3)
    both = np.concatenate([held, extent])
    np.testing.assert_array_equal(out, decode_rows(both[codes], row_format))
    tier.admit(np.array([2, 0], np.int32), np.array([4, 1], np.int32), place)
    held[[4, 1]] = extent[[2, 0]]
    np.testing.assert_array_equal(tier.read(np.arange(5)), decode_rows(held, row_format))
    tier.wrap(np.array([[0, 1, 2], [1, 2, 0]], np.int32))
    held[[1, 2, 0]] = held[[0, 1, 2]]
    np.testing.assert_array_equal(tier.read(np.arange(5)), decode_rows(held, row_format))
    tier.wrap(np.empty((2, 0), np.int32))
    with pytest.raises(ValueError, match="not all within the tier's 5"):
        tier.wrap(np.array([[0], [5]], np.int32))
    with pytest.raises(ValueError, match="not all within the tier's 5"):
        tier.admit(np.array([0], np.int32), np.array([-1], np.int32), place)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_gather(threads: int) -> None:
    row_format = RowFormat(dtype="int8", width=9)
    rows = encoded(30, row_format)
    codes: NDArray[Any] = np.random.default_rng(1).integers(0, 30, 101)
    out = np.empty((101, 9), np.float32)
    gather_table(as_words(rows.reshape(-1), row_format), codes, row_format, out, threads)
    np.testing.assert_array_equal(out, decode_rows(rows[codes], row_format))
    assert row_words(row_format) == 13
