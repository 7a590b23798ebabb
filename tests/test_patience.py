import time

import pytest
from patience import Deadline, answer, slowness, wait_until


def test_a_deadline_comes_later_on_a_slower_machine() -> None:
    began, deadline = time.monotonic(), Deadline(0.1, measure=lambda: 4.0)
    while not deadline.is_over:
        time.sleep(0.01)
    assert time.monotonic() - began > 0.4
    assert slowness() >= 1.0


def test_a_condition_that_never_holds_is_given_up() -> None:
    with pytest.raises(AssertionError, match="not within 0 s of an idle machine"):
        wait_until(lambda: False, 0.05)


def test_an_answer_is_found_among_other_lines() -> None:
    assert answer(["(raylet) 17 workers\n", "\n", "pids 1 2\n", "pids 3\n"], "pids") == ["1", "2"]
    with pytest.raises(AssertionError, match="ended without 'pids', after '1 2"):
        answer(["1 2\n"], "pids")
