import threading

import pytest

from penstock.engine.chunked.backend import RankFailed
from penstock.engine.supervision import policy
from penstock.engine.supervision.restarts import run_with_restarts
from penstock.engine.trainer import Stopped
from penstock.storage.errors import DataError, DoesNotFit, MissingDependency


class Attempts:
    """Fails as often as told."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.numbers = list(errors), list[int]()
        self.told = list[tuple[int, str]]()

    def __call__(self, number: int) -> str:
        self.numbers.append(number)
        if self.errors:
            raise self.errors.pop(0)
        return f"done at {number}"

    def on_restart(self, number: int, error: BaseException) -> None:
        self.told.append((number, str(error)))


def test_attempts_follow_each_other_until_one_succeeds() -> None:
    attempts = Attempts(RankFailed("first"))
    assert run_with_restarts(attempts, 3, attempts.on_restart) == "done at 1"
    assert attempts.numbers == [0, 1] and attempts.told == [(1, "first")]


def test_the_last_failure_is_raised_with_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "LONGEST_PAUSE_S", 0.01)
    attempts = Attempts(RankFailed("first\nwith a stack"), RankFailed("second"), RankFailed("third"))
    with pytest.raises(RankFailed, match="third") as caught:
        run_with_restarts(attempts, 2)
    assert attempts.numbers == [0, 1, 2]
    assert caught.value.__notes__ == [
        "attempt 0 of this run failed with: first",
        "attempt 1 of this run failed with: second",
    ]


@pytest.mark.parametrize(
    "error", [ValueError("a"), DataError("b"), DoesNotFit("c"), MissingDependency("d"), OSError(5)]
)
def test_what_a_restart_cannot_mend_is_raised_at_once(error: Exception) -> None:
    attempts = Attempts(error)
    with pytest.raises(type(error)) as caught:
        run_with_restarts(attempts, 9, attempts.on_restart)
    assert caught.value is error and attempts.numbers == [0] and not attempts.told


def test_a_stop_ends_retries_but_hides_no_error_of_its_own() -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match=r"stopped after a failure \(killed\); run the same command again") as caught:
        run_with_restarts(Attempts(RankFailed("killed")), 9, stop_requested=stop)
    assert isinstance(caught.value.__cause__, RankFailed)
    with pytest.raises(DataError):
        run_with_restarts(Attempts(DataError("bad")), 9, stop_requested=stop)
    with pytest.raises(Stopped, match="after a checkpoint"):
        run_with_restarts(Attempts(Stopped("after a checkpoint")), 9, stop_requested=stop)


def test_a_stop_ends_a_pause() -> None:
    stop = threading.Event()

    def ask(number: int, error: BaseException) -> None:
        if number == 2:
            stop.set()

    with pytest.raises(Stopped, match="stopped after a failure"):
        run_with_restarts(Attempts(*(RankFailed(str(n)) for n in range(9))), 9, ask, stop_requested=stop)
