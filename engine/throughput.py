"""The one rate of training: items over the seconds spent on them, of the running epoch so far.

Seconds in which training takes items, computes, waits for the feed or for other replicas count; evaluations and
checkpoints do not. The record that ends an epoch has the rate of the epoch, and every place that shows a rate shows the
number of a record. It is of this process: an epoch that another one began counts from where this one took it up.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Throughput:
    """Items, seeds and seconds of training in this process."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seeds = 0
        self.items_per_s: float | None = None
        "Of the running epoch, as of the last `mark`; None before it."
        self.seconds = 0.0
        "Of all blocks that ended."
        self._since: float | None = None
        self._epoch_items, self._epoch_s, self._marked_s = 0, 0.0, 0.0
        self._past_items, self._past_s = 0, 0.0  # of epochs that ended

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds of a block."""
        self._since = self._clock()
        try:
            yield
        finally:
            spent = self._clock() - self._since
            self._since = None
            self.seconds += spent
            self._epoch_s += spent

    def add(self, items: int, seeds: int) -> None:
        """Count items that were trained on."""
        self._epoch_items += items
        self.seeds += seeds

    def mark(self) -> None:
        """Take the rate, now that what was added is done."""
        running_s = 0.0 if self._since is None else self._clock() - self._since
        self._marked_s = self._epoch_s + running_s
        self.items_per_s = self._epoch_items / max(1e-9, self._marked_s)

    def end_epoch(self) -> None:
        """Let what comes be of another epoch."""
        self._past_items += self._epoch_items
        self._past_s += self._marked_s
        self._epoch_items, self._epoch_s, self._marked_s = 0, 0.0, 0.0
        self.items_per_s = None

    @property
    def mean_items_per_s(self) -> float:
        """Of all epochs, in as many seconds as their own rates count."""
        return (self._past_items + self._epoch_items) / max(1e-9, self._past_s + self._marked_s)
