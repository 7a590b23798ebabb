"""`run_ranges`: after an error nobody works on, and helpers that never began are not waited for."""

import threading

import pytest

from penstock.kernels.parallel import parallel_for, run_ranges


def test_every_range_runs_once() -> None:
    seen: list[tuple[int, int]] = []
    run_ranges(lambda lo, hi: seen.append((lo, hi)), [(n, n + 1) for n in range(50)], 4)
    assert sorted(seen) == [(n, n + 1) for n in range(50)]


def test_an_error_is_raised_when_nobody_writes_any_more() -> None:
    """Helpers are held inside their ranges until long after the caller failed; the error comes when they are out."""
    inside, release, ended = threading.Semaphore(0), threading.Event(), list[int]()

    def kernel(lo: int, hi: int) -> None:
        if lo == 0:
            for _ in range(2):
                inside.acquire()
            threading.Timer(0.2, release.set).start()
            raise ValueError("the first range")
        inside.release()
        release.wait()
        ended.append(lo)

    with pytest.raises(ValueError, match="the first range"):
        run_ranges(kernel, [(n, n + 1) for n in range(9)], 3)
    assert len(ended) == 2, "ranges ended behind the caller's back, or began after the error"


@pytest.mark.parametrize("failing", range(4))
def test_the_error_of_any_thread_is_raised(failing: int) -> None:
    together = threading.Barrier(4)

    def kernel(lo: int, hi: int) -> None:
        together.wait()
        if lo == failing:
            raise ValueError(f"range {lo}")

    with pytest.raises(ValueError, match=f"range {failing}"):
        run_ranges(kernel, [(n, n + 1) for n in range(4)], 4)


def test_helpers_that_never_began_are_not_waited_for() -> None:
    """Two callers keep both threads of the pool busy until a third, which needs none of them, is done."""
    done, busy = threading.Event(), threading.Barrier(5)

    def long(lo: int, hi: int) -> None:
        busy.wait()
        done.wait()

    others = [threading.Thread(target=run_ranges, args=(long, [(0, 1), (1, 2)], 2)) for _ in range(2)]
    for other in others:
        other.start()
    busy.wait()
    third = threading.Thread(target=parallel_for, args=(lambda lo, hi: None, 8, 2))
    third.start()
    third.join(30)
    finished = not third.is_alive()
    done.set()
    for thread in (*others, third):
        thread.join()
    assert finished, "it waited for helpers that were queued behind other callers' work"
