import os
import subprocess
import sys
import time

import pytest
from patience import Deadline, answer, slowness, wait_until

BUSY = "import time; ends = time.monotonic() + 60\nwhile time.monotonic() < ends: pass"


def test_a_deadline_comes_later_where_others_work() -> None:
    alone = slowness()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(4 * len(os.sched_getaffinity(0)))]
    try:
        began, deadline = time.monotonic(), Deadline(0.5)
        while not deadline.is_over:
            time.sleep(0.01)
        assert alone >= 1.0 and time.monotonic() - began > 1.0
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_a_condition_that_never_holds_is_given_up() -> None:
    with pytest.raises(AssertionError, match="not within 0 s of an idle machine"):
        wait_until(lambda: False, 0.05)


def test_an_answer_is_found_among_other_lines() -> None:
    assert answer(["(raylet) 17 workers\n", "\n", "pids 1 2\n", "pids 3\n"], "pids") == ["1", "2"]
    with pytest.raises(AssertionError, match="ended without 'pids', after '1 2"):
        answer(["1 2\n"], "pids")
