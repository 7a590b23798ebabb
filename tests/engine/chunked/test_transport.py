"""One contract for all transports, among three ranks that are threads, or processes over gloo."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.transport import IN_FLIGHT, PeerLost, ThreadHub, ThreadTransport

RunScript = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def small_ranks() -> Iterator[Any]:
    """The module beside this one, which children import too: they have our sys.path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        yield import_module("small_ranks")


def run_threads(small_ranks: Any, script: str, num_ranks: int) -> list[Any]:
    hub = ThreadHub()
    with ThreadPoolExecutor(num_ranks) as pool:
        ranks = [ThreadTransport(hub, rank, 0.3 if script == "wait_for_silence" else 60) for rank in range(num_ranks)]
        return list(pool.map(lambda rank: small_ranks.SCRIPTS[script](rank, num_ranks), ranks))


@pytest.fixture(scope="module", params=["threads", "processes"])
def run_script(request: Any, small_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunScript]:
    """A function that runs a script of `small_ranks` on two ranks and gives what each returns."""
    if request.param == "threads":
        yield lambda script: run_threads(small_ranks, script, 2)
        return
    specs = small_ranks.small_specs(tmp_path_factory.mktemp("ranks"))
    with open_processes(specs, open_rank="small_ranks:open_small") as backend:
        yield lambda script: backend.call("run", [(script,)] * 2)


def test_lanes_keep_their_order_with_everything_under_way_at_once(run_script: RunScript, small_ranks: Any) -> None:
    payload = 5 * 5 * 4 * sum(rows * columns for rows, columns in small_ranks.SIZES)  # 5 channels, 5 rounds, 4 bytes
    assert run_script("crossfire") == [(payload, []), (payload, [])]


@pytest.mark.gpu
def test_lanes_of_ranks_that_share_gpus_keep_their_order(small_ranks: Any, tmp_path: Path) -> None:
    """One rank more than there are GPUs, so rows are staged in host memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    others = torch.cuda.device_count()
    specs = small_ranks.small_specs(tmp_path, stages=others + 1, device="cuda")
    payload = others * 5 * 5 * 4 * sum(rows * columns for rows, columns in small_ranks.SIZES)
    with open_processes(specs, open_rank="small_ranks:open_small") as backend:
        assert backend.call("crossfire_on_device") == [(payload, [])] * (others + 1)


def test_large_tensors_cross_each_other(run_script: RunScript, small_ranks: Any) -> None:
    sent = 8 * 4 * small_ranks.LARGE[0] * small_ranks.LARGE[1]
    assert run_script("large_both_ways") == [(sent, True), (sent, True)]


def test_gathered_tensors_have_the_order_of_ranks(run_script: RunScript, small_ranks: Any) -> None:
    first, second = run_script("gather")
    assert torch.equal(first, second)
    assert torch.equal(first, run_threads(small_ranks, "gather", 2)[0])
    assert not torch.equal(first[0], first[1])


def test_silence_is_told_with_the_peer_and_the_remedy(run_script: RunScript) -> None:
    said = run_script("wait_for_silence")[0]
    assert "rank 0 waited" in said and "for rank 1 (exact)" in said and "timeout_s" in said


def test_a_peer_that_went_away_is_lost_at_once(small_ranks: Any, tmp_path: Path) -> None:
    with open_processes(small_ranks.small_specs(tmp_path), open_rank="small_ranks:open_small") as backend:
        assert "rank 0 lost rank 1 (halo)" in backend.call("run", [("leave",)] * 2)[0]


def test_threads_stop_waiting_when_another_rank_failed() -> None:
    hub = ThreadHub()
    transport = ThreadTransport(hub, 0, 600)
    threading.Timer(0.1, hub.aborted.set).start()
    with pytest.raises(PeerLost, match="rank 0 stopped waiting for rank 1"):
        transport.receive(1, "forward")


def test_a_sender_among_threads_gets_only_so_far_ahead() -> None:
    """What waits in a lane is memory that no budget counts."""
    hub, tensor = ThreadHub(), torch.zeros(1)
    sender, receiver = ThreadTransport(hub, 0, 0.1), ThreadTransport(hub, 1, 60)
    for _ in range(IN_FLIGHT):
        sender.send(1, "forward", tensor)
    with pytest.raises(PeerLost, match=r"rank 0 waited 0 s for rank 1 \(forward\)"):
        sender.send(1, "forward", tensor)
    receiver.expect(0, "forward", (1,), torch.float32)
    sender.send(1, "forward", tensor)
    assert receiver.receive(0, "forward") is tensor
