from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.storage import budget
from penstock.storage.errors import DoesNotFit


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 << 30),
        ("512M", 512 << 20),
        ("1.5 GB", 1_500_000_000),
        ("1000", 1000),
        (1000, 1000),
        (" 2 k ", 2048),
        ("3b", 3),
        ("0.5TiB", 1 << 39),
        ("7kb", 7000),
    ],
)
def test_sizes_are_read(text: int | str, num_bytes: int) -> None:
    assert budget.parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "-1", "4 GiBs", "1e9", "GB", "1.2.3M", "nan"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write for example"):
        budget.parse_bytes(text)


@given(st.integers(0, 2**50))
def test_sizes_are_printed_with_three_digits(num_bytes: int) -> None:
    printed = budget.format_bytes(num_bytes)
    # 1000..1023 of a unit in three digits is off by half a percent at most
    number, unit = printed.split(" ")
    assert abs(float(number) * budget.parse_bytes(f"1{unit}") - num_bytes) <= 0.006 * num_bytes


def test_the_machine_is_measured(tmp_path: Path) -> None:
    assert 0 < budget.available_memory() <= budget.total_memory()
    assert budget.num_threads() >= 1
    assert budget.free_disk(tmp_path / "not" / "there" / "yet") > 0


def test_a_disk_that_is_too_small_is_refused(small_disk: Path) -> None:
    budget.require_free_disk(small_disk, 10 << 20, "a test")
    with pytest.raises(DoesNotFit, match=r"a test needs 30 MiB at .*disk, where .* are free"):
        budget.require_free_disk(small_disk, 30 << 20, "a test")


def test_the_peak_follows_memory_and_starts_anew() -> None:
    before = budget.peak_rss_bytes()
    block = np.ones(64 << 20, np.uint8)
    grown = budget.peak_rss_bytes()
    assert grown >= before and grown >= len(block)
    del block
    if budget.reset_peak_rss():
        assert budget.peak_rss_bytes() < grown
