"""Open what a replica gets from feeders: a job, a puller that fetches its windows, and a feed of them."""

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.cluster.feeder import MAX_ROWS_BYTES
from penstock.cluster.lane import Pace
from penstock.cluster.puller import KINDS
from penstock.cluster.puller import Puller as Puller  # these two for callers of `open_pulled_feed`
from penstock.cluster.puller import PullStats as PullStats
from penstock.engine.feed import open_pack_feed
from penstock.engine.prefetch import Feed
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.sampler.rolling import clear_windows
from penstock.sampler.windowtask import WindowJob, check_kept
from penstock.storage.budget import Budgets
from penstock.storage.deal import Deal
from penstock.storage.errors import FormatError, Outgrown
from penstock.storage.graph import GraphStore, Split
from penstock.storage.manifest import read_json, write_json
from penstock.storage.npyfile import write_npy
from penstock.storage.pack import write_packset
from penstock.storage.rows import RowFormat
from penstock.storage.transfer import Address, Refused, connect

logger = logging.getLogger(__name__)

Refresh = Callable[[], Sequence[Address]]
_AGAIN_S = 0.5


class PulledRows:
    """Rows from any feeder that is in use; a `storage.table.RowSource`."""

    def __init__(self, puller: Puller) -> None:
        self._puller, self.fingerprint = puller, puller.job.meta.graph

    @contextmanager
    def open_rows(self, row_format: RowFormat) -> Iterator["_Rows"]:
        """See `RowSource`."""
        assert row_format == self._puller.job.meta.row_format, (row_format, self._puller.job.meta)
        yield _Rows(self._puller, row_format.row_bytes)


class _Rows:
    def __init__(self, puller: Puller, row_bytes: int) -> None:
        self._puller, self._row_bytes = puller, row_bytes
        self.bytes_read = 0

    def gather(self, ids: NDArray[Any], out: NDArray[np.uint8]) -> None:
        """See `table.Rows`; asks one feeder after the other until `check` ends it."""
        most = max(1, MAX_ROWS_BYTES // self._row_bytes)
        for lo in range(0, len(ids), most):
            wanted = np.ascontiguousarray(ids[lo : lo + most], "<i8")
            data = self._ask(wanted.tobytes(), len(wanted) * self._row_bytes)
            out[lo : lo + most] = np.frombuffer(data, np.uint8).reshape(len(wanted), self._row_bytes)
            self.bytes_read += len(data)

    def _ask(self, ids: bytes, num_bytes: int) -> bytes:
        puller = self._puller
        while True:
            for address in puller.addresses:
                try:
                    with connect(address, puller.token, timeout_s=puller.pace.answer_s) as client:
                        client.ask({"op": "open", "job": puller.job.to_json()}, kept_bytes(puller.job))
                        data = client.ask({"op": "rows"}, ids, limit=num_bytes)[1]
                    if len(data) == num_bytes:
                        return data
                except (OSError, Refused, FormatError) as error:
                    logger.info("no rows from feeder %s:%d: %s", *address, error)
            puller.check()
            puller.pause(0.05)


def kept_bytes(job: WindowJob) -> bytes:
    """The payload that goes with a job."""
    return job.kept.astype("<i8").tobytes()


class NoFeeder(RuntimeError):
    """None could be asked for windows, for now."""


def describe_job(addresses: Sequence[Address], token: bytes, request: dict[str, Any], *, pace: Pace) -> WindowJob:
    """Let the first feeder that can set a job up; raises what is wrong with the request, NoFeeder where none can.

    A feeder that cannot be reached may be about to be replaced, but that is the caller's to know.
    """
    causes = []
    for address in addresses:
        try:
            with connect(address, token, timeout_s=pace.answer_s) as client:
                client.set_timeout(pace.timeout_s)
                head, kept = client.ask({"op": "describe", "request": request})
            job = WindowJob.from_json(head["job"], np.frombuffer(kept, "<i8").astype(np.int64))
            check_kept(job)
            return job
        except Refused as error:
            if error.kind in ("DoesNotFit", "DataError", "ValueError"):
                kinds = KINDS | {"ValueError": ValueError}
                raise kinds[error.kind](f"feeder {address[0]}:{address[1]}: {error}") from error
            causes.append(f"{address[0]}:{address[1]} ({error})")
        except (OSError, FormatError) as error:
            causes.append(f"{address[0]}:{address[1]} ({error})")
    found = "; ".join(causes) or "there is none"
    raise NoFeeder(f"no feeder can set windows up: {found}; look at their nodes, then resume the run")


def _describe_in_time(
    addresses: Sequence[Address], token: bytes, request: dict[str, Any], pace: Pace, refresh: Refresh | None
) -> tuple[WindowJob, Sequence[Address]]:
    """Let a feeder set a job up; while none can, ask those that `refresh` gives. The job, and whom to pull from."""
    ends = time.monotonic() + pace.timeout_s
    while True:
        try:
            return describe_job(addresses, token, request, pace=pace), addresses
        except NoFeeder:
            if refresh is None or time.monotonic() > ends:
                raise
        time.sleep(_AGAIN_S)
        with suppress(OSError, Refused):  # a driver that is gone ends this process soon
            addresses = refresh()


@contextmanager
def open_puller(
    addresses: Sequence[Address],
    token: bytes,
    *,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    packs: Path,
    start_step: int,
    stop_step: int,
    split: Split = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    shares: int = 1,
    pace: Pace | None = None,
    refresh: Refresh | None = None,
) -> Iterator[Puller]:
    """Pull the windows of steps start_step <= s < stop_step into the folder `packs`, which is deleted at the end.

    `budgets` are this replica's, its disk for windows here. `shares` is how many pullers use the same feeders at a
    time: each may fill that part of their disks. `refresh` says which feeders there are, should none of `addresses` be
    there any more. Raises DoesNotFit, DataError or ValueError where it cannot be done so; Outgrown where an item is
    larger than expected, which the next call with this `packs` makes room for.
    """
    pace = pace or Pace()
    request = {
        "sample": sample.model_dump(mode="json"),
        "plan": plan.model_dump(mode="json"),
        "budgets": asdict(budgets),
        "start_step": start_step,
        "stop_step": stop_step,
        "split": split,
        "shuffle": shuffle,
        "deal": None if deal is None else asdict(deal),
        "shares": shares,
    }
    known = packs.parent / "known.json"
    request["known_inputs"] = read_json(known)["inputs"] if known.exists() else 0
    job, addresses = _describe_in_time(addresses, token, request, pace, refresh)
    clear_windows(packs)

    def note(error: Exception) -> None:  # at once: whoever meets the error may end this process
        if isinstance(error, Outgrown):
            write_json(known, {"inputs": max(error.num_inputs, 2 * job.meta.max_inputs)})

    try:
        write_packset(packs, job.meta)
        write_npy(packs / "residents.npy", job.residents)
        size = job.meta.window_items
        windows = range(start_step // size, max(start_step // size + 1, -(-stop_step // size)))
        puller = Puller(job, packs, windows, token, pace, disk_bytes=budgets.disk_bytes, on_error=note)
        try:
            puller.set_feeders(addresses)
            yield puller
        finally:
            puller.close()
    finally:
        shutil.rmtree(packs, ignore_errors=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledFeed:
    """A feed, and what fills it."""

    feed: Feed
    puller: Puller


@contextmanager
def open_pulled_feed(
    addresses: Sequence[Address],
    token: bytes,
    *,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    packs: Path,
    start_step: int,
    stop_step: int,
    split: Split = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    shares: int = 1,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    pace: Pace | None = None,
    graph: GraphStore | None = None,
    auto_release: bool = True,
    refresh: Refresh | None = None,
) -> Iterator[PulledFeed]:
    """Feed steps start_step <= s < stop_step of a replica from feeders; see `open_puller` and `open_pack_feed`.

    Batches are those of every other feed, bit for bit. Without a `graph` the tiers are filled by the feeders.
    """
    with (
        open_puller(
            addresses,
            token,
            sample=sample,
            plan=plan,
            budgets=budgets,
            packs=packs,
            start_step=start_step,
            stop_step=stop_step,
            split=split,
            shuffle=shuffle,
            deal=deal,
            shares=shares,
            pace=pace,
            refresh=refresh,
        ) as puller,
        open_pack_feed(
            packs,
            PulledRows(puller) if graph is None else graph,
            start_step=start_step,
            stop_step=stop_step,
            host_memory=budgets.host_bytes,
            device=device,
            threads=threads,
            producer_check=puller.check,
            delete_behind=True,
            auto_release=auto_release,
        ) as feed,
    ):
        yield PulledFeed(feed=feed, puller=puller)
