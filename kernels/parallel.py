"""Run a range kernel on threads.

Kernels release the GIL and take a half-open range, so plain threads split the work. We do not use Numba's `prange`: its
threading layer may not be entered from two threads at once (the feed gathers while the model aggregates), and
compiling it takes ten times as long. The ranges depend only on sizes, never on timing, and no kernel's result depends
on how its range is cut.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import pairwise
from typing import Any

from numpy.typing import NDArray

_PARTS_PER_THREAD = 4  # calling a kernel costs about 10 us; waiting for a delayed half of the work cost 5 % of an epoch


@lru_cache(maxsize=8)
def _pool(parts: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(parts, thread_name_prefix="penstock-kernel")


def split(total: int, parts: int) -> list[tuple[int, int]]:
    """Cut [0, total) into at most `parts` non-empty ranges of equal length, give or take one."""
    parts = max(1, min(parts, total))
    return [(total * n // parts, total * (n + 1) // parts) for n in range(parts)]


def run_ranges(kernel: Callable[[int, int], object], ranges: list[tuple[int, int]], threads: int) -> None:
    """Call `kernel(lo, hi)` for every range, on this thread and up to `threads - 1` others.

    Each thread takes the next range when it is done with one, so one that shares its core delays the rest little. After
    an error no range begins any more, and it is raised when those under way have ended: nobody writes into the caller's
    arrays behind its back.
    """
    workers = min(threads, len(ranges))
    left = deque(ranges)

    def work() -> None:
        try:
            while left:
                try:
                    bounds = left.popleft()
                except IndexError:  # another thread took the last one
                    return
                kernel(*bounds)
        except BaseException:
            left.clear()
            raise

    futures = [_pool(workers).submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:
        # Helpers that have not begun are not waited for: their threads may be busy with somebody else's long work.
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
    for future in begun:
        future.result()


def parallel_for(kernel: Callable[[int, int], object], total: int, threads: int) -> None:
    """Call `kernel(lo, hi)` over equal parts of [0, total) on `threads` threads."""
    if total > 0:
        run_ranges(kernel, split(total, num_parts(threads)), threads)


def num_parts(threads: int) -> int:
    """Into how many ranges work is cut for so many threads."""
    return threads if threads == 1 else _PARTS_PER_THREAD * threads


def split_by_edges(indptr: NDArray[Any], parts: int) -> list[tuple[int, int]]:
    """Cut the rows of `indptr` [R+1] into at most `parts` non-empty ranges of about equal rows plus edges."""
    rows = len(indptr) - 1
    total = rows + int(indptr[rows])
    cuts = [
        bisect_left(range(rows + 1), total * n // parts, key=lambda row: row + int(indptr[row])) for n in range(parts)
    ]
    return [(lo, hi) for lo, hi in pairwise([*cuts, rows]) if lo < hi]
