import threading
import time

import pytest

from penstock.storage.pipe import Pipe, PipeClosed, join_worker, start_worker


def test_values_arrive_in_order_and_a_full_pipe_waits() -> None:
    pipe: Pipe[int] = Pipe(2)
    reached = []

    def work() -> None:
        for n in range(50):
            pipe.put(n)
            reached.append(n)

    thread = start_worker("test-pipe", work, pipe)
    time.sleep(0.05)
    assert len(reached) == 2
    assert [pipe.get() for _ in range(50)] == list(range(50))
    join_worker(thread)


def test_an_error_overtakes_queued_values_and_stays() -> None:
    pipe: Pipe[int] = Pipe(8)

    def work() -> None:
        pipe.put(1)
        raise OSError("the disk is gone")

    join_worker(start_worker("test-pipe", work, pipe))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone") as caught:
            pipe.get()
        assert any(entry.name == "work" for entry in caught.traceback)


def test_the_first_error_wins() -> None:
    pipe: Pipe[int] = Pipe(1)
    pipe.fail(ValueError("first"))
    pipe.fail(ValueError("second"))
    with pytest.raises(ValueError, match="first"):
        pipe.get()


def test_closing_wakes_both_sides() -> None:
    empty: Pipe[int] = Pipe(1)
    full: Pipe[int] = Pipe(1)
    full.put(0)
    ended = []

    def wait(side: str) -> None:
        with pytest.raises(PipeClosed):
            full.put(1) if side == "put" else empty.get()
        ended.append(side)

    threads = [threading.Thread(target=wait, args=(side,)) for side in ("put", "get")]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    empty.close()
    full.close()
    for thread in threads:
        thread.join(10)
    assert sorted(ended) == ["get", "put"]


def test_a_producer_that_ends_without_a_word_is_noticed() -> None:
    pipe: Pipe[int] = Pipe(1)
    join_worker(start_worker("silent", lambda: None, pipe))
    with pytest.raises(RuntimeError, match="thread silent ended without a word"):
        pipe.get()
