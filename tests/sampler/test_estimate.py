"""Estimates: rates are measured on the disk, times follow from them."""

from pathlib import Path

import pytest

from penstock.sampler.estimate import DiskRates, break_even, measure_disk, random_read_s, sequential_s

RATES = DiskRates(read_bytes_per_s=1000.0, write_bytes_per_s=500.0, random_reads_per_s=10.0)


def test_the_disk_is_measured_and_left_clean(tmp_path: Path) -> None:
    rates = measure_disk(tmp_path)
    assert min(rates.read_bytes_per_s, rates.write_bytes_per_s) > 1e6 and rates.random_reads_per_s >= 1
    assert list(tmp_path.iterdir()) == []


def test_times_follow_from_rates() -> None:
    assert sequential_s(2000, 5, RATES) == pytest.approx(2.5)
    assert random_read_s(100, 1, RATES) == pytest.approx(10.0)
    assert random_read_s(100, 4097, RATES) == pytest.approx(20.0)


def test_break_even_counts_whole_epochs() -> None:
    assert break_even(10.0, 3.0, 1.0) == 5
    assert break_even(11.0, 3.0, 1.0) == 6
    assert break_even(0.0, 3.0, 1.0) == 0
    assert break_even(10.0, 1.0, 1.0) is None
