"""Stacks of real processes: busy, stopped, gone, and too young to know the signal."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.engine.supervision import stacks

SCRIPT = """
import sys, time
from pathlib import Path
from penstock.engine.supervision.stacks import write_when_asked

def wait_here():
    print("ready", flush=True)
    while True:
        time.sleep(0.1)

if sys.argv[1] != "young":
    write_when_asked(Path(sys.argv[1]))
wait_here()
"""


@pytest.fixture
def children(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Four processes, the last of which does not know the signal."""
    names = [str(stacks.stacks_file(tmp_path, rank)) for rank in range(3)] + ["young"]
    found = [
        subprocess.Popen([sys.executable, "-c", SCRIPT, name], stdout=subprocess.PIPE, text=True) for name in names
    ]
    for process in found:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield found
    for process in found:
        process.kill()
        process.communicate()


def test_all_processes_are_told_apart(children: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    os.kill(children[1].pid, signal.SIGSTOP)
    children[2].kill()
    children[2].wait()
    pids = {rank: process.pid for rank, process in enumerate(children)}
    files = {rank: stacks.stacks_file(tmp_path, rank) for rank in pids}
    found = stacks.collect(pids, files)
    assert "in wait_here" in found[0] and not stacks.is_frozen(found[0])
    assert stacks.is_frozen(found[1]) and "in wait_here" in found[1]
    assert found[2] == "its process has ended"
    assert found[3].startswith("its process has not come so far")
    assert [children[rank].poll() for rank in (0, 1, 3)] == [None] * 3
    ends = time.monotonic() + 20  # a signal is not taken at once
    while (state := Path(f"/proc/{pids[1]}/status").read_text().split("State:")[1].split()[0]) != "T":
        assert time.monotonic() < ends, f"it was not stopped again: {state}"
        time.sleep(0.01)
    again = stacks.collect({0: pids[0]}, {0: files[0]})
    assert again[0].count("in wait_here") == 1  # not what was written before


def test_threads_are_found_by_their_numbers() -> None:
    done = threading.Event()

    def wait_over_there() -> None:
        done.wait()

    thread = threading.Thread(target=wait_over_there)
    thread.start()
    try:
        while not thread.is_alive():
            time.sleep(0.01)
        found = stacks.of_threads({0: thread.ident, 1: None})
    finally:
        done.set()
        thread.join()
    assert "in wait_over_there" in found[0] and found[1] == "its thread has ended"


WORKER = """Thread 0x1 (most recent call first):
  File "/x/queue.py", line 1 in get

Current thread 0x2 (most recent call first):
  File "/x/engine/chunked/torch_transport.py", line 80 in _wait
  File "/x/engine/chunked/worker.py", line 90 in answer_call
  File "/x/engine/chunked/worker.py", line 120 in main
"""


def test_a_rank_that_waits_for_another_is_seen_to() -> None:
    assert stacks.waits_for_others(WORKER)
    assert not stacks.waits_for_others(WORKER.replace("torch_transport", "features"))
    assert not stacks.waits_for_others(WORKER.replace("answer_call", "_read_calls"))  # another thread waits


def test_the_thread_that_does_the_work_is_shown_first_and_the_rest_cut() -> None:
    shown = stacks.excerpt(f"{stacks._FROZEN}\n\n{WORKER}", 3)
    assert shown.splitlines() == [
        stacks._FROZEN,
        "Current thread 0x2 (most recent call first):",
        '  File "/x/engine/chunked/torch_transport.py", line 80 in _wait',
        "... and 4 lines more",
    ]
    assert stacks.excerpt("its process has ended") == "its process has ended"
