"""Feeders in real processes that are killed, frozen, short of disk, or gone: batches are those of a feed in memory."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from patience import allowed_s, wait_until

from penstock.cluster.feeder import open_feeder
from penstock.cluster.feeder_builder import FeederSpec
from penstock.cluster.feeder_pool import FeederPool, FeederProcess, open_feeder_processes
from penstock.cluster.lane import Pace, check_index
from penstock.cluster.puller import Puller
from penstock.cluster.pulling import PulledFeed, open_pulled_feed, open_puller
from penstock.engine.chunked.backend import RankFailed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import MiniBatch
from penstock.sampler.neighbors import SampleConfig, sample_trace
from penstock.sampler.plan import PlanConfig
from penstock.sampler.rolling import used_bytes
from penstock.storage.budget import Budgets
from penstock.storage.deal import Deal
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.pack import read_pack_index
from penstock.storage.transfer import Address, connect, new_token

SAMPLE = SampleConfig(fanouts=(3, 3), batch_size=16, seed=4)
BUDGETS = Budgets(device_bytes=800, host_bytes=80_000, disk_bytes=220_000)
FEEDER_DISK = 400_000
STOP = 44  # four epochs
PACE = Pace(answer_s=3.0, slow_s=3.0, timeout_s=30.0)
Content = tuple[Any, ...]


def content(batch: MiniBatch) -> Content:
    """Everything of a batch, as bytes."""
    tensors = [batch.input_ids, batch.labels, batch.features]
    for block in batch.blocks:
        tensors += [block.indptr, block.indices]
    return (batch.step, batch.item, batch.epoch, batch.num_seeds, *(t.numpy().tobytes() for t in tensors))


@pytest.fixture(autouse=True)
def no_lane_left() -> Iterator[None]:
    """After a test, every lane must have ended."""
    yield
    assert "penstock-lane" not in [thread.name for thread in threading.enumerate()]


@pytest.fixture(scope="module")
def expected(tiny_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> list[Content]:
    """All steps, from memory."""
    folder = tmp_path_factory.mktemp("memory")
    trace = sample_trace(tiny_graph, folder / "trace", SAMPLE, num_epochs=4, host_memory=64 << 20, threads=1)
    with open_memory_feed(tiny_graph, trace, start_step=0, stop_step=STOP) as feed:
        return [content(batch) for batch in feed]


@pytest.fixture(scope="module")
def pool(tiny_graph: GraphStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeederPool]:
    """Two feeders, replaced where a test kills one."""
    folder = tmp_path_factory.mktemp("feeders") / "disk"
    with open_feeder_processes(
        tiny_graph.path, folder, count=2, disk_bytes=FEEDER_DISK, memory=64 << 20, retries=10
    ) as found:
        found.wait_ready(allowed_s(60), count=2)
        yield found
    assert not folder.exists()


@contextmanager
def pulled(addresses: list[Address], token: bytes, packs: Path, **changes: Any) -> Iterator[PulledFeed]:
    options: dict[str, Any] = {
        "sample": SAMPLE,
        "plan": PlanConfig(),
        "budgets": BUDGETS,
        "start_step": 0,
        "stop_step": STOP,
        "pace": PACE,
        "threads": 1,
    }
    with open_pulled_feed(addresses, token, packs=packs, **(options | changes)) as found:
        yield found
    assert not packs.exists()


def pid_of(pool: FeederPool, number: int) -> int:
    handle = pool._handles[number]
    assert isinstance(handle, FeederProcess)
    return handle.pid


def test_batches_are_those_of_a_feed_in_memory(pool: FeederPool, expected: list[Content], tmp_path: Path) -> None:
    with pulled(pool.addresses, pool.token, tmp_path / "packs") as found:
        assert [content(batch) for batch in found.feed] == expected
        meta, stats, fed = found.puller.job.meta, found.puller.stats(), found.feed.stats
    assert meta.num_windows > 6 and meta.device_slots > 0 and meta.host_slots > 0
    assert fed.device_rows > 0 and fed.host_rows > 0 and fed.pack_rows > 0
    assert stats.pulled_windows >= meta.num_windows and stats.feeders == 2 and not found.puller.faults
    assert 0 < stats.disk_high_water <= BUDGETS.disk_bytes
    for status in pool.status():
        assert 0 < status["high_water_bytes"] <= FEEDER_DISK and status["used_bytes"] == 0


@pytest.mark.parametrize("start", [17, 23])
@pytest.mark.parametrize("has_graph", [False, True])
def test_a_feed_that_starts_anywhere_needs_no_feature_table(
    pool: FeederPool, tiny_graph: GraphStore, expected: list[Content], tmp_path: Path, start: int, has_graph: bool
) -> None:
    graph = tiny_graph if has_graph else None
    with pulled(pool.addresses, pool.token, tmp_path / "packs", start_step=start, stop_step=30, graph=graph) as found:
        assert start % found.puller.job.meta.window_items
        assert [content(batch) for batch in found.feed] == expected[start:30]


@pytest.mark.parametrize("policy", ["static", "none"])
def test_other_policies_and_deals(pool: FeederPool, expected: list[Content], tmp_path: Path, policy: Any) -> None:
    deal = Deal(replicas=2, rank=1, group_items=4, epoch_items=11)
    with pulled(
        pool.addresses,
        pool.token,
        tmp_path / "packs",
        plan=PlanConfig(policy=policy),
        deal=deal,
        stop_step=12,
        shares=2,
    ) as found:
        batches = [content(batch) for batch in found.feed]
    assert [batch[4:] for batch in batches] == [expected[deal.whole(own)][4:] for own in range(12)]


def test_replicas_in_lockstep_share_feeders(pool: FeederPool, expected: list[Content], tmp_path: Path) -> None:
    deals = [Deal(replicas=2, rank=rank, group_items=2, epoch_items=11) for rank in range(2)]
    with ExitStack() as stack:
        feeds = [
            stack.enter_context(
                pulled(pool.addresses, pool.token, tmp_path / str(deal.rank), deal=deal, shares=2, stop_step=15)
            ).feed
            for deal in deals
        ]
        for own in range(15):
            for deal, feed in zip(deals, feeds, strict=True):
                assert content(next(feed))[4:] == expected[deal.whole(own)][4:]


def test_evaluation_is_fed_the_same_way(pool: FeederPool, tiny_graph: GraphStore, tmp_path: Path) -> None:
    trace = sample_trace(
        tiny_graph, tmp_path / "trace", SAMPLE, split="valid", shuffle=False, host_memory=64 << 20, threads=1
    )
    stop = trace.meta.items_per_epoch
    with open_memory_feed(tiny_graph, trace, start_step=0, stop_step=stop) as feed:
        wanted = [content(batch) for batch in feed]
    with pulled(pool.addresses, pool.token, tmp_path / "packs", split="valid", shuffle=False, stop_step=stop) as found:
        assert [content(batch) for batch in found.feed] == wanted


def test_a_killed_feeder_is_replaced_and_its_windows_are_built_again(
    pool: FeederPool, expected: list[Content], tmp_path: Path
) -> None:
    lost = len(pool.losses)
    with pulled(pool.addresses, pool.token, tmp_path / "packs") as found:
        batches = [content(next(found.feed))]
        os.kill(pid_of(pool, 0), signal.SIGKILL)
        for batch in found.feed:
            if pool.poll():
                found.puller.set_feeders(pool.addresses)
            batches.append(content(batch))
        assert batches == expected
        wait_until(lambda: len(pool.losses) > lost or pool.poll())
    assert "-9" in pool.losses[-1].cause and pool.losses[-1].is_replaced
    pool.wait_ready(allowed_s(60), count=2)


def test_a_frozen_feeder_is_named_and_left(pool: FeederPool, expected: list[Content], tmp_path: Path) -> None:
    frozen, address = pid_of(pool, 0), pool.addresses[0]
    with pulled(pool.addresses, pool.token, tmp_path / "packs") as found:
        batches = [content(next(found.feed))]
        os.kill(frozen, signal.SIGSTOP)
        batches += [content(batch) for batch in found.feed]
        assert batches == expected
        wait_until(lambda: bool(found.puller.faults))
    (fault,) = found.puller.faults
    assert fault.address == address and "did not answer within 3 s" in fault.cause
    pool.replace(fault.address, fault.cause)
    wait_until(lambda: not Path(f"/proc/{frozen}").exists())
    assert address not in pool.wait_ready(allowed_s(60), count=2)


class Middle:
    """Stands between a puller and a feeder; counts bytes of the feeder, flips some, or cuts the connection."""

    def __init__(self, target: Address, *, flip_at: frozenset[int] = frozenset(), on_bytes: Any = None) -> None:
        self._target, self._flip_at, self._on_bytes = target, flip_at, on_bytes
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self._listener.getsockname()[:2]
        self.done = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                for source, target, is_back in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._carry, args=(source, target, is_back), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_back: bool) -> None:
        with suppress(OSError):
            while data := bytearray(source.recv(4096)):
                if is_back:
                    for place in self._flip_at & set(range(self.done, self.done + len(data))):
                        data[place - self.done] ^= 255
                    self.done += len(data)
                    if self._on_bytes is not None:
                        self._on_bytes(self.done)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@pytest.mark.slow
def test_a_kill_in_mid_transfer_leaves_no_half_of_a_window(
    pool: FeederPool, expected: list[Content], tmp_path: Path
) -> None:
    victim, seen = pid_of(pool, 0), threading.Event()

    def kill(done: int) -> None:
        if done > 60_000 and not seen.is_set():  # the first packs are on their way
            seen.set()
            os.kill(victim, signal.SIGKILL)

    middle = Middle(pool.addresses[0], on_bytes=kill)
    try:
        with pulled([pool.addresses[1]], pool.token, tmp_path / "packs") as found:
            found.puller.set_feeders([middle.address, pool.addresses[1]])
            assert [content(batch) for batch in found.feed] == expected
            wait_until(lambda: bool(found.puller.faults))
    finally:
        middle.close()
    assert seen.is_set() and found.puller.faults[0].address == middle.address
    pool.poll()
    pool.wait_ready(allowed_s(60), count=2)


def test_what_arrives_damaged_is_pulled_again(pool: FeederPool, expected: list[Content], tmp_path: Path) -> None:
    with pulled([pool.addresses[1]], pool.token, tmp_path / "probe") as found:
        job = found.puller.job
    # the middle of what is surely a pack: a damaged head would end the connection
    middle = Middle(pool.addresses[0], flip_at=frozenset({6000 + 8 * len(job.kept), job.window_bytes // 2}))
    try:
        with pulled(pool.addresses[1:], pool.token, tmp_path / "packs") as found:
            found.puller.set_feeders([middle.address])
            assert [content(batch) for batch in found.feed] == expected
            assert not found.puller.faults
            assert middle.done > found.puller.stats().pulled_bytes + job.window_bytes // 2
    finally:
        middle.close()


def test_disks_keep_within_their_budgets_while_nobody_reads(
    tiny_graph: GraphStore, expected: list[Content], tmp_path: Path
) -> None:
    token, highest = new_token(), [0, 0]
    spec = FeederSpec(graph=tiny_graph.path, folder=tmp_path / "feeder", disk_bytes=240_000, memory=64 << 20, threads=2)
    stopped = threading.Event()

    def measure() -> None:
        while not stopped.is_set():
            # files come and go while they are counted: what two counts agree on was there
            with suppress(FileNotFoundError):  # a folder went while it was listed
                highest[0] = max(highest[0], min(used_bytes(tmp_path / "feeder") for _ in range(2)))
            highest[1] = max(highest[1], min(_pack_bytes(tmp_path / "packs") for _ in range(2)))
            time.sleep(0.002)

    watcher = threading.Thread(target=measure)
    watcher.start()
    with open_feeder(spec, token) as (feeder, address):
        with pulled([address], token, tmp_path / "packs", budgets=BUDGETS) as found:
            batches = [content(next(found.feed))]
            wait_until(lambda: feeder.status()["windows_waiting"] > 0 and found.puller.stats().windows_waiting > 1)
            time.sleep(0.3)  # nothing may grow now
            batches += [content(batch) for batch in found.feed]
            assert batches == expected
        wait_until(lambda: feeder.status()["used_bytes"] == 0)
        status = feeder.status()
    stopped.set()
    watcher.join()
    assert 0 < highest[0] <= 240_000 and status["high_water_bytes"] <= 240_000
    assert 0 < highest[1] <= found.puller.stats().disk_high_water <= BUDGETS.disk_bytes
    assert not list((tmp_path / "feeder").iterdir())


def test_a_window_that_is_being_fetched_gives_its_room_to_no_other(
    tiny_graph: GraphStore, pool: FeederPool, tmp_path: Path
) -> None:
    token = new_token()
    with pulled(pool.addresses, pool.token, tmp_path / "packs") as found:
        job = found.puller.job
    spec = FeederSpec(graph=tiny_graph.path, folder=tmp_path / "feeder", disk_bytes=FEEDER_DISK, memory=64 << 20)
    with open_feeder(spec, token) as (_, address), connect(address, token, timeout_s=10) as client:
        client.ask({"op": "open", "job": job.to_json()}, job.kept.astype("<i8").tobytes())

        def states(*windows: int) -> list[str]:
            told = client.ask({"op": "wait", "windows": windows, "seconds": 1.0})[0]["windows"]
            return [told[str(window)]["state"] for window in windows]

        last = job.meta.num_windows - 1
        for window in (last - 1, last):
            assert client.ask({"op": "build", "window": window})[0]["state"] != "no room"
            wait_until(lambda window=window: states(window) == ["done"])  # type: ignore[misc]
        client.ask({"op": "fetch", "window": last, "part": "index"})
        for window in range(last - 1):
            if client.ask({"op": "build", "window": window})[0]["state"] == "no room":
                break
            wait_until(lambda window=window: states(window) == ["done"])  # type: ignore[misc]
        assert states(last - 1, last) == ["unknown", "done"]
        pack = BytesIO()
        client.ask_into({"op": "fetch", "window": last, "part": "pack"}, pack, sink_checks=True)
        assert len(pack.getvalue()) > 0


def test_an_index_that_no_window_can_have_is_refused(pool: FeederPool, tmp_path: Path) -> None:
    with pulled(pool.addresses, pool.token, tmp_path / "packs") as found:
        index = read_pack_index(tmp_path / "packs", _first_window(tmp_path / "packs"))
        check_index(index, found.puller.job.meta, index.window, sum(index.bytes))
        for changes in (
            {"window": index.window + 1},
            {"bytes": (-1, *index.bytes[1:])},
            {"bytes": (0.5, *index.bytes[1:])},
            {"bytes": ("1", *index.bytes[1:])},
            {"bytes": index.bytes[1:]},
            {"bytes": ()},
            {"offsets": (4096, *index.offsets[1:])},
            {"offsets": 0},
            {"xxh3": index.xxh3[1:]},
            {"xxh3": 7},
            {"first_item": "0"},
            {"first_item": -1},
            {"max_inputs": None},
            {"max_inputs": 1 << 40},
            {"shared_bytes": -1},
        ):
            wrong = replace(index, **changes)
            with pytest.raises(FormatError, match="malformed"):
                check_index(wrong, found.puller.job.meta, index.window, sum(index.bytes))


def _first_window(packs: Path) -> int:
    wait_until(lambda: bool(list(packs.glob("window-*.json"))))
    return int(min(packs.glob("window-*.json")).stem.split("-")[1])


def _pack_bytes(folder: Path) -> int:
    """Bytes of packs by inode, since they are renamed once they are there."""
    found: dict[int, int] = {}
    for path in folder.glob("window-*.pack*"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            found[stat.st_ino] = stat.st_size
    return sum(found.values())


def test_no_feeder_left_is_told_in_time(tiny_graph: GraphStore, tmp_path: Path) -> None:
    token = new_token()
    spec = FeederSpec(graph=tiny_graph.path, folder=tmp_path / "feeder", disk_bytes=240_000, memory=64 << 20)
    with open_feeder(spec, token) as (_, address):
        opened = pulled([address], token, tmp_path / "packs", pace=Pace(timeout_s=1.0))
        found = opened.__enter__()
        next(found.feed)
    with pytest.raises(RuntimeError, match=rf"no feeder is left for 1 s.*{address[0]}:{address[1]} \("):
        for _ in found.feed:
            pass
    opened.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="no feeder can set windows up"):
        with pulled([address], token, tmp_path / "packs"):
            pass


def test_the_wrong_token_gets_nothing(pool: FeederPool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no feeder can set windows up.*token"):
        with pulled(pool.addresses, new_token(), tmp_path / "packs"):
            pass


def test_a_feeder_that_is_yet_to_come_is_waited_for(pool: FeederPool, tmp_path: Path) -> None:
    found = iter([[], [], pool.addresses])
    with pulled([], pool.token, tmp_path / "packs", refresh=lambda: next(found)) as feed:
        assert set(feed.puller.addresses) == set(pool.addresses)
    assert not list(found)
    with pytest.raises(RuntimeError, match="there is none"):
        with pulled([], pool.token, tmp_path / "packs", pace=Pace(timeout_s=0.1), refresh=lambda: []):
            pytest.fail("it opened")


def test_what_is_wrong_with_the_request_reaches_the_caller(pool: FeederPool, tmp_path: Path) -> None:
    def pull(**changes: Any) -> None:
        options: dict[str, Any] = {"sample": SAMPLE, "plan": PlanConfig(), "budgets": BUDGETS}
        with open_puller(
            pool.addresses,
            pool.token,
            packs=tmp_path / "p",
            start_step=0,
            stop_step=5,
            pace=PACE,
            **(options | changes),
        ):
            pass

    with pytest.raises(DoesNotFit, match="--disk"):
        pull(budgets=Budgets(device_bytes=0, host_bytes=80_000, disk_bytes=9000))
    with pytest.raises(DoesNotFit, match="cluster.feeder_disk"):
        pull(shares=60)
    with pytest.raises(ValueError, match="no edge weights"):
        pull(sample=SAMPLE.model_copy(update={"weighted": True}))


def test_a_window_that_cannot_be_built_ends_the_run_with_its_cause(pool: FeederPool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"sample": SAMPLE, "plan": PlanConfig(), "budgets": BUDGETS, "stop_step": STOP}
    with open_puller(pool.addresses, pool.token, packs=tmp_path / "p", start_step=0, pace=PACE, **options) as puller:
        job, windows = replace(puller.job, meta=replace(puller.job.meta, max_inputs=20)), range(0, 3)
    (tmp_path / "q").mkdir()
    puller = Puller(job, tmp_path / "q", windows, pool.token, PACE, disk_bytes=1 << 20)
    with closing(puller):
        puller.set_feeders(pool.addresses)

        with pytest.raises(DoesNotFit, match="20 were expected; resume the run"):
            wait_until(lambda: puller.check() is not None)  # type: ignore[func-returns-value]


def test_requests_are_checked(pool: FeederPool, tmp_path: Path) -> None:
    with connect(pool.addresses[0], pool.token, timeout_s=10) as client:
        for head in ({"op": "build", "window": 0}, {"op": "rows"}, {"op": "fetch", "window": 0, "part": "pack"}):
            with pytest.raises(Exception, match="before a job was opened"):
                client.ask(head)
    with pulled(pool.addresses, pool.token, tmp_path / "packs") as found:
        job = found.puller.job
    with connect(pool.addresses[0], pool.token, timeout_s=10) as client:
        kept = job.kept.astype("<i8").tobytes()
        client.ask({"op": "open", "job": job.to_json()}, kept)
        for head, message in (
            ({"op": "build", "window": -1}, "not within"),
            ({"op": "build", "window": 10**6}, "not within"),
            ({"op": "fetch", "window": 0, "part": "../../../etc/passwd"}, "is not there"),
            ({"op": "fetch", "window": 0, "part": "pack"}, "is not there"),
            ({"op": "dance", "window": 0}, "nothing that a feeder does"),
        ):
            with pytest.raises(Exception, match=message):
                client.ask(head)
        with pytest.raises(Exception, match="set it up anew"):
            client.ask({"op": "open", "job": job.to_json()}, kept[:-8])
        assert client.ask({"op": "status"})[0]["fingerprint"] == job.meta.graph


@pytest.mark.slow
def test_a_feeder_that_keeps_dying_ends_the_run(tiny_graph: GraphStore, tmp_path: Path) -> None:
    with open_feeder_processes(tiny_graph.path, tmp_path / "feeders", count=1, memory=64 << 20, retries=1) as pool:
        for _ in range(2):
            pool.wait_ready(allowed_s(60))
            (process,) = pool._handles
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[attr-defined]  # a FeederProcess
            if not pool.losses:
                wait_until(lambda: bool(pool.losses) or pool.poll())
        with pytest.raises(RankFailed, match=r"was lost .*, as were those in its place .*2 losses in all"):
            wait_until(lambda: pool.poll() and False)
    assert [loss.is_replaced for loss in pool.losses] == [True, False]
