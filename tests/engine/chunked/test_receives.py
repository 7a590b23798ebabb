"""Receives that are posted when their send is due, as over NCCL: the same bits, none waits ahead."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from penstock.engine.chunked import transport
from penstock.engine.chunked.transport import ThreadTransport

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case


def test_receives_posted_when_they_are_due_change_nothing(
    make_case: Callable[..., "Case"], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(stages=2, epochs=2, num_layers=3)
    ahead = case.run()
    waiting: dict[tuple[int, str], int] = {}
    most: list[int] = []
    expect, receive = ThreadTransport.expect, ThreadTransport.receive

    def note_expect(self: ThreadTransport, peer: int, channel: Any, *args: Any) -> None:
        waiting[self.rank, channel] = waiting.get((self.rank, channel), 0) + 1
        most.append(waiting[self.rank, channel])
        expect(self, peer, channel, *args)

    def note_receive(self: ThreadTransport, peer: int, channel: Any) -> Any:
        waiting[self.rank, channel] -= 1
        return receive(self, peer, channel)

    monkeypatch.setattr(transport, "RECEIVES_AHEAD", 0)
    monkeypatch.setattr(ThreadTransport, "expect", note_expect)
    monkeypatch.setattr(ThreadTransport, "receive", note_receive)
    due = case.run()
    assert case.equal(due, ahead)
    assert most and max(most) == 1 and not any(waiting.values())
