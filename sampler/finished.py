"""Which windows of a pack set are finished: those whose files hold, to the last byte, what the plan asks for."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.pass_layout import PassLayout, lay_out
from penstock.sampler.plan import Plan
from penstock.storage.errors import FormatError
from penstock.storage.extents import PackWindow, Slot, verify_extent
from penstock.storage.pack import WINDOW_FILES, PackIndex, read_pack_index, read_residents, read_wrap
from penstock.storage.trace import window_name

logger = logging.getLogger(__name__)


def finished_windows(plan: Plan, out: Path) -> set[int]:
    """The windows of a plan that need no packing, counted from its first. Reads all their bytes.

    What is damaged, or of a plan that placed extents otherwise, is said and deleted.
    """
    windows = [n for n in range(plan.meta.num_windows) if (out / window_name(n, "json")).is_file()]
    layout, slot = lay_out(plan, windows, 1 << 62), Slot(0, limit=plan.meta.max_extent_bytes)
    found = set()
    for window in windows:
        try:
            _check_window(plan, layout, out, window, slot)
            found.add(window)
        except (FormatError, FileNotFoundError) as error:
            logger.warning("window %d of %s is packed again: %s", window, out, error)
            drop_window(out, window)
    return found


def drop_window(out: Path, window: int) -> None:
    """Delete the files of a window."""
    for suffix in WINDOW_FILES:  # the index goes first: no half of a window looks whole
        (out / window_name(window, suffix)).unlink(missing_ok=True)


def check_index(plan: Plan, layout: PassLayout, index: PackIndex) -> None:
    """FormatError unless an index accounts for every byte that the plan places in its window."""
    regions = [r for r in layout.regions if r.window == index.window and r.item >= 0]
    wanted = (
        plan.heads[regions[0].item].item,
        tuple(region.offset for region in regions),
        tuple(plan.heads[region.item].extent_bytes for region in regions),
        layout.shared_bytes[index.window],
        len(regions),
    )
    if (index.first_item, index.offsets, index.bytes, index.shared_bytes, len(index.xxh3)) != wanted:
        raise FormatError(f"its index is of another plan: {len(index.offsets)} extents, {len(regions)} are planned")


def _check_window(plan: Plan, layout: PassLayout, out: Path, window: int, slot: Slot) -> None:
    assert plan.arrays is not None
    index = read_pack_index(out, window)
    check_index(plan, layout, index)
    _check_array(read_residents(out, index), plan.arrays.residents[window])
    if window == plan.meta.num_windows - 1:
        _check_array(read_wrap(out, index), plan.arrays.wrap)
    with PackWindow(out, index) as opened:
        for item in range(index.first_item, index.first_item + len(index.offsets)):
            verify_extent(opened.load(item, item, slot))


def _check_array(found: NDArray[Any], wanted: NDArray[Any]) -> None:
    if not np.array_equal(found, wanted):
        raise FormatError("its residents or its wrap are not as planned")


def check_finished(plan: Plan, out: Path, windows: Sequence[int]) -> None:
    """FormatError unless every window has an index that accounts for all of its bytes, and a file of that size."""
    layout = lay_out(plan, windows, 1 << 62)
    for window in windows:
        check_index(plan, layout, read_pack_index(out, window))
