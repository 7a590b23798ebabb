"""Ranks in processes of their own: what crosses, which error wins, and that nothing is left behind."""

import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from penstock.engine.chunked import processes, threads
from penstock.engine.chunked.backend import OpenBackend, RankFailed, open_board
from penstock.engine.chunked.failures import encode_error, exit_reason
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.schedule import plan_epoch
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.transport import PeerLost
from penstock.engine.supervision.watch import Watch
from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.history import StaleRead

SMALL = "small_ranks:open_small"
Children = Callable[[], list[psutil.Process]]
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import small_ranks
from penstock.engine.chunked.processes import open_processes

with open_processes(small_ranks.small_specs(Path({scratch!r})), open_rank="small_ranks:open_small") as ranks:
    print(*ranks.pids, flush=True)
    ranks.call("surroundings")
    ranks.call("sleep")
"""


@pytest.fixture(scope="module")
def small_ranks() -> Iterator[Any]:
    """The module beside this one, which children import too: they have our sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield import_module("small_ranks")


@contextmanager
def open_small_threads(specs: Sequence[Any], *, open_rank: str) -> Iterator[Any]:
    """Threads whose ranks are small ones: they have no option for it, since nobody else needs one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "open_rank", getattr(import_module("small_ranks"), open_rank.partition(":")[2]))
        with open_threads(specs) as backend:
            yield backend


def are_gone(pids: list[int]) -> bool:
    """Whether no process is left, not even a zombie of ours."""
    return not any(psutil.pid_exists(pid) for pid in pids)


def wait_until(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < ends, "waited 60 s"
        time.sleep(0.02)


def test_values_cross_and_children_end_in_good_order(small_ranks: Any, tmp_path: Path) -> None:
    specs = [replace(spec, threads=1) for spec in small_ranks.small_specs(tmp_path)]
    with open_processes(specs, open_rank="small_ranks:open_small") as backend:
        pids = backend.pids
        first, second = backend.call("surroundings")
        assert [first["pid"], second["pid"]] == pids and os.getpid() not in pids
        assert first["OMP_NUM_THREADS"] == first["NUMBA_NUM_THREADS"] == "1" and first["GLOO_SOCKET_IFNAME"] == "lo"
        assert first["path"] == [str(path) for path in sys.path] and not first["main"]
        weights = backend.call("weights", [(1.0,), (2.0,)])
        assert torch.equal(weights[1]["w"], torch.tensor([[2.0, 4.0], [8.0, 10.0]])) and int(weights[1]["rank"]) == 1
    assert are_gone(pids)
    assert {path.name for path in tmp_path.iterdir()} == {"heartbeats", "closed-0", "closed-1"}


@pytest.mark.slow
def test_the_error_of_one_rank_is_raised_as_it_is(small_ranks: Any, tmp_path: Path) -> None:
    with open_processes(small_ranks.small_specs(tmp_path), open_rank="small_ranks:open_small") as backend:
        with pytest.raises(DoesNotFit, match="history_memory=5 is too small") as caught:
            backend.call("refuse", [(1, "DoesNotFit")] * 2)
        assert caught.value.host_bytes == 7
        with pytest.raises(RuntimeError, match="ranks that failed take no more calls"):
            backend.call("weights", [(1.0,)] * 2)
    assert are_gone(backend.pids)


@pytest.mark.slow
def test_a_rank_that_does_not_open_is_raised_as_it_is(small_ranks: Any, tmp_path: Path, children: Children) -> None:
    with pytest.raises(DataError, match="is not a graph; ingest one"):
        with open_processes(small_ranks.small_specs(tmp_path), open_rank="small_ranks:open_badly"):
            pytest.fail("it opened")
    assert not children()


def test_a_killed_rank_is_named_with_its_action(small_ranks: Any, tmp_path: Path) -> None:
    plan = plan_epoch(Layout(2, 1), epoch=3, order=(1, 0), gradient_mode="stale", recompute=False, defer_weights=True)
    with open_processes(small_ranks.small_specs(tmp_path), open_rank="small_ranks:open_small") as backend:
        began = time.monotonic()
        with pytest.raises(RankFailed) as caught:
            backend.call("train_epoch", [(plan, 1, 2)] * 2)
        assert time.monotonic() - began < 5  # the issue's limit; the ranks' own patience is 60 s
    action = plan.actions[1][2]
    assert "rank 1 (stage 1 of 0..1, part 0 of 0..0) was ended by SIGKILL" in str(caught.value)
    assert f"during train_epoch of epoch 3, after 2 of {len(plan.actions[1])} actions, at {action}" in str(caught.value)
    assert are_gone(backend.pids)


@pytest.mark.slow
def test_a_rank_that_a_signal_stopped_is_named_with_its_stack(small_ranks: Any, tmp_path: Path) -> None:
    """Rank 0 is found at an earlier slot, although both are silent."""
    plan = plan_epoch(Layout(2, 1), epoch=3, order=(1, 0), gradient_mode="stale", recompute=False, defer_weights=True)
    with open_processes(small_ranks.small_specs(tmp_path, timeout_s=1.5), open_rank=SMALL) as backend:
        with pytest.raises(RankFailed) as caught:
            backend.call("freeze", [(plan, 0, 1)] * 2)
    text, actions = str(caught.value), plan.actions[0]
    assert text.startswith("rank 0 (stage 0 of 0..1, part 0 of 0..0) did not move for ")
    assert f"timeout_s=1.5 (process {backend.pids[0]} on host {platform.node()})" in text
    assert f"during freeze of epoch 3, after 1 of {len(actions)} actions, at {actions[1]}" in text
    assert "Its own:\nstopped by a signal (SIGSTOP)" in text and "in stop_here" in text
    stacks = (tmp_path / "stacks.txt").read_text()
    assert str(tmp_path / "stacks.txt") in text and "in stop_here" in stacks
    assert (
        f"== rank 1 (stage 1 of 0..1, part 0 of 0..0), process {backend.pids[1]}" in stacks and "in receive" in stacks
    )
    assert are_gone(backend.pids)


@pytest.mark.slow
@pytest.mark.parametrize("open_backend", [open_processes, open_small_threads])
def test_a_rank_that_hangs_alone_is_named_with_its_stack(
    small_ranks: Any, tmp_path: Path, open_backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_GRACE_S", 0.1)  # threads cannot be killed
    with pytest.raises(RankFailed, match=r"(?s)rank 1 \(.*did not move for .*during get_stuck.*in sleep_for_ever"):
        with open_backend(small_ranks.small_specs(tmp_path, timeout_s=1.0), open_rank=SMALL) as backend:
            backend.call("get_stuck", [(1,)] * 2)


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_open_is_named(
    small_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, children: Children
) -> None:
    """Rank 1 waits for what rank 0 never sends; both have met."""
    monkeypatch.setattr(processes, "START_S", 0.0)
    with pytest.raises(RankFailed, match=r"(?s)rank 0 \(.*did not move .*during start, after 2 of 3 .*sleep_for_ever"):
        with open_processes(small_ranks.small_specs(tmp_path, timeout_s=10.0), open_rank="small_ranks:open_never"):
            pytest.fail("it opened")
    assert not children()


@pytest.mark.slow
def test_a_stopped_child_that_is_sent_much_does_not_stop_its_parent(small_ranks: Any, tmp_path: Path) -> None:
    with open_processes(small_ranks.small_specs(tmp_path, timeout_s=1.0), open_rank=SMALL) as backend:
        os.kill(backend.pids[1], signal.SIGSTOP)
        with pytest.raises(RankFailed, match=r"rank 1 \(.*did not move"):
            backend.call("take", [(bytes(1 << 24),)] * 2)
    assert are_gone(backend.pids)


@pytest.mark.slow
def test_a_child_that_is_stopped_when_it_is_told_to_end_is_killed(
    small_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "_GRACE_S", 2.0)
    with open_processes(small_ranks.small_specs(tmp_path), open_rank=SMALL) as backend:
        os.kill(backend.pids[1], signal.SIGSTOP)
    assert "rank 1 did not end within 2 s; it is killed" in caplog.text
    assert are_gone(backend.pids)


@pytest.mark.slow
def test_children_end_with_a_killed_parent_and_do_not_run_its_script(small_ranks: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(Path(__file__).parent), scratch=str(tmp_path)))
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        wait_until(lambda: all((tmp_path / f"asleep-{rank}").exists() for rank in range(2)))
        for pid in pids:  # a scheduler sends SIGTERM to all of a job: the parent decides
            ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
            assert ignored is not None
            assert int(ignored[1], 16) >> (signal.SIGTERM - 1) & int(ignored[1], 16) >> (signal.SIGINT - 1) & 1
        assert len(pids) == 2
        parent.kill()
        stdout, stderr = parent.communicate()
    wait_until(lambda: are_gone(pids))
    assert stdout == "" and "this is not for the user's stdout" in stderr


@pytest.mark.parametrize("open_backend", [open_processes, open_threads])
def test_ranks_on_cuda_need_a_gpu(small_ranks: Any, tmp_path: Path, open_backend: OpenBackend) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="device=cuda, but this machine has no CUDA device; set device to cpu"):
        with open_backend(small_ranks.small_specs(tmp_path, device="cuda")):
            pytest.fail("it opened")


def test_errors_cross_as_what_they_are_or_as_text(small_ranks: Any, tmp_path: Path) -> None:
    spec = small_ranks.small_specs(tmp_path)[1]
    full = OSError(28, "No space left on device", "history")
    errors: list[Exception] = [ValueError("a"), DataError("b"), StaleRead("c"), PeerLost("d"), full]
    for error in errors:
        found = pickle.loads(encode_error(spec, error))
        assert type(found) is type(error) and str(found) == str(error)

    class Local(ValueError):
        """Cannot be pickled."""

    errors = [Local("e"), AssertionError("f")]
    for error in errors:
        found = pickle.loads(encode_error(spec, error))
        assert isinstance(
            found, RankFailed
        ) and f"rank 1 (stage 1 of 0..1, part 0 of 0..0) failed with {type(error).__name__}" in str(found)


def watch(small_ranks: Any, scratch: Path, stages: int) -> Watch:
    specs = small_ranks.small_specs(scratch, stages=stages)
    return Watch(
        specs, open_board(specs), "run", [()] * stages, collect=lambda ranks: {}, where=lambda rank: f"host {rank}"
    )


def test_what_became_of_a_peer_explains_that_it_was_lost(small_ranks: Any, tmp_path: Path) -> None:
    found = watch(small_ranks, tmp_path, 3)
    found.fail(0, PeerLost("rank 0 lost rank 1"))
    assert not found.is_over and found.has_failed
    found.fail(1, RankFailed("rank 1 was ended by SIGKILL"))
    assert found.is_over
    found.fail(2, DataError("rows are missing"))  # it comes too late
    with pytest.raises(RankFailed, match="rank 1 was ended by SIGKILL"):
        found.values()


def test_only_lost_peers_are_reported_as_a_failed_rank(small_ranks: Any, tmp_path: Path) -> None:
    found = watch(small_ranks, tmp_path, 1)
    found.fail(0, PeerLost("rank 0 waited 5 s for rank 1"))
    with pytest.raises(RankFailed, match="rank 0: rank 0 waited 5 s"):
        found.values()


def test_that_a_rank_ends_after_its_error_does_not_hide_it(small_ranks: Any, tmp_path: Path) -> None:
    found = watch(small_ranks, tmp_path, 2)
    found.fail(0, PeerLost("rank 0 waited 5 s for rank 1"))
    found.fail(0, RankFailed("rank 0 ended with exit code 1"))
    assert not found.is_over  # what became of rank 1 may still be told
    wait_until(lambda: found.tick() or found.is_over)  # type: ignore[func-returns-value]
    with pytest.raises(RankFailed, match="rank 0: rank 0 waited 5 s for rank 1"):
        found.values()


def test_an_error_of_a_ranks_own_says_where_it_was(small_ranks: Any, tmp_path: Path) -> None:
    found = watch(small_ranks, tmp_path, 2)
    found.add(0, None)
    found.fail(1, DataError("rows are missing"))
    with pytest.raises(DataError, match="rows are missing") as caught:
        found.values()
    assert caught.value.__notes__ == ["in rank 1 (host 1)"]


def test_exit_codes_read_as_signals() -> None:
    assert exit_reason(3) == "ended with exit code 3"
    assert "SIGKILL: out of memory" in exit_reason(-9) and "SIGSEGV" in exit_reason(-11)
