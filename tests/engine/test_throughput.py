"""The rate of training, by a clock that is given."""

from penstock.engine.throughput import Throughput


class Clock:
    """Goes on when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_what_lies_between_blocks_does_not_count() -> None:
    clock = Clock()
    found = Throughput(clock)
    for _ in range(2):
        with found.running():
            clock.now += 2.0
            found.add(10, 640)
            found.mark()
            clock.now += 0.5
        clock.now += 60.0  # an evaluation
    assert found.items_per_s == 20 / 4.5 and found.seconds == 5.0
    assert found.mean_items_per_s == found.items_per_s and found.seeds == 1280


def test_an_epoch_has_a_rate_of_its_own() -> None:
    clock = Clock()
    found = Throughput(clock)
    for seconds in (1.0, 4.0):
        with found.running():
            clock.now += seconds
            found.add(8, 8)
            found.mark()
        assert found.items_per_s == 8 / seconds
        found.end_epoch()
    assert found.mean_items_per_s == 16 / 5.0


def test_before_anything_was_trained_there_is_no_rate() -> None:
    found = Throughput(Clock())
    assert found.items_per_s is None and found.mean_items_per_s == 0.0
