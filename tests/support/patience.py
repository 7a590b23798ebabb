"""How long a test waits: seconds of an idle machine, however busy or slow this one is.

`Deadline(30)` is over when 30 s have passed on the machine that these tests were written on, alone on it; here time
counts for less where a fixed piece of work takes longer, now, or where more wants to run than there are cores.
`wait_until` and `allowed_s` (for what takes a timeout) are made of the same unit. No test is to know another one.
"""

import os
import time
from collections.abc import Callable, Iterable

_SPINS = 150_000
_SPIN_S = 0.0135  # of those, measured there
_MEASURE_S = 1.0  # between two measurements


def _spin_s() -> float:
    began, total = time.perf_counter(), 0
    for number in range(_SPINS):
        total += number * number
    return time.perf_counter() - began


def slowness() -> float:
    """How often slower this machine is now than the one that is the measure, at least 1."""
    # one who sleeps mostly, as a test does, is let to the front: the load tells what others, who work, get
    return max(1.0, _spin_s() / _SPIN_S, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def allowed_s(seconds: float) -> float:
    """Seconds to allow here for what takes so many there."""
    return seconds * slowness()


class Deadline:
    """Counts time from when it is made, as it is looked at; `measure` says how slow the machine is."""

    def __init__(self, seconds: float, measure: Callable[[], float] = slowness) -> None:
        self._left_s, self._seen_s, self._measure = seconds, time.monotonic(), measure
        self._measured_s, self._slowness = self._seen_s, measure()

    @property
    def is_over(self) -> bool:
        """Whether the time is up. To be asked again and again: what passes between two looks counts at one pace."""
        now_s = time.monotonic()
        if now_s - self._measured_s > _MEASURE_S:
            self._measured_s, self._slowness = now_s, self._measure()
        self._left_s -= (now_s - self._seen_s) / self._slowness
        self._seen_s = now_s
        return self._left_s < 0


def wait_until(condition: Callable[[], object], seconds: float = 30.0, *, poll_s: float = 0.02) -> None:
    """Wait for a condition; AssertionError when the time is up."""
    deadline = Deadline(seconds)
    while not condition():
        assert not deadline.is_over, f"not within {seconds:.0f} s of an idle machine"
        time.sleep(poll_s)


def answer(lines: Iterable[str], mark: str) -> list[str]:
    """The words behind `mark` in the first line of a child that begins with it: libraries print lines of their own."""
    seen = []
    for line in lines:
        first, *rest = line.split() or [""]
        if first == mark:
            return rest
        seen.append(line)
    raise AssertionError(f"the child ended without {mark!r}, after {''.join(seen)[-2000:]!r}")
