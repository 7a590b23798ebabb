"""Where a replica gets its items: from packs that it makes on its own host, or from feeders."""

import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from penstock.cluster.directory import ask, followed
from penstock.cluster.lane import Pace
from penstock.cluster.pulling import open_pulled_feed
from penstock.config import RunConfig
from penstock.engine.feed import open_pack_feed
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import FeedStats
from penstock.feeds import open_train_feed
from penstock.prepare import deal_items, own_splits, pack_splits, plan_splits, read_summary, sample_config
from penstock.process_memory import process_bytes
from penstock.run import Run
from penstock.sampler.neighbors import count_items
from penstock.storage.budget import MIB, Budgets, default_budgets, default_host_bytes, free_disk
from penstock.storage.errors import InUse
from penstock.storage.graph import GraphMeta, Split, open_graph
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import PackMode
from penstock.storage.progress import Progress
from penstock.storage.remote.config import local_copy
from penstock.storage.remote.hostlock import flocked
from penstock.storage.remote.stage import staged
from penstock.storage.rows import RowFormat
from penstock.storage.transfer import Address

_IDENTITY = "replica.json"
_WINDOW_PATIENCE = 0.6  # of the watchdog's: that no feeder gives windows is to be told as such


class Source(Protocol):
    """What feeds a replica; steps are the replica's own."""

    meta: GraphMeta
    epoch_items: int
    "Items of an epoch, of all replicas."
    row_bytes: int
    "Of a row as packs hold it."

    def plan(self) -> PackMode:
        """Sample and plan; the mode that suits this host. To be called first."""

    def prepare(self, mode: PackMode) -> None:
        """Pack in this mode. To be called second."""

    def open_train(self, start: int, stop: int) -> AbstractContextManager[Iterable[MiniBatch]]:
        """Feed training steps start <= s < stop."""

    def open_split(self, split: Split) -> AbstractContextManager[tuple[Iterable[MiniBatch], int]] | None:
        """Feed own items of an evaluated split, and say how many; None where there is none."""

    def stats(self) -> FeedStats | None:
        """Of the training feed."""

    def queue_bytes(self) -> int | None:
        """Windows of feeders that are here and wait; None without feeders."""

    def facts(self) -> dict[str, Any]:
        """More for result.json."""


def _row_bytes(config: RunConfig, meta: GraphMeta) -> int:
    return RowFormat(dtype=config.plan.row_dtype or meta.feature_dtype, width=meta.num_features).row_bytes


def replica_folder(config: RunConfig, rank: int, replicas: int) -> Path:
    """Where a replica keeps packs and scratch, on its own host."""
    return config.work_dir / f"replica-{rank}-of-{replicas}"


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    """Clear the folder unless what it holds is of the same; and delete those of other numbers of replicas."""
    suffix = folder.name[folder.name.index("-of-") :]
    for other in folder.parent.glob("replica-*-of-*"):
        if not other.name.endswith(suffix):
            shutil.rmtree(other, ignore_errors=True)
    if not (folder / _IDENTITY).is_file() or read_json(folder / _IDENTITY) != identity:
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith(".lock"):
                path.unlink()
        write_json(folder / _IDENTITY, identity)


@contextmanager
def own_folder(config: RunConfig, rank: int, replicas: int, made_of: dict[str, Any]) -> Iterator[Path]:
    """Hold the replica's folder, cleared unless it is `made_of` the same: one of the attempt before this one may still
    be dying."""
    folder = replica_folder(config, rank, replicas)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(flocked(folder / ".lock", wait_s=config.cluster.timeout_s))
        except BlockingIOError as error:
            raise InUse(
                f"{folder} is in use by {error}, which did not end within {config.cluster.timeout_s:g} s "
                "(cluster.timeout_s); end it, or give another --stage-dir"
            ) from None
        _claim(folder, made_of)
        yield folder


def _share_of_host(config: RunConfig, folder: Path, sharing: int, device_bytes: int | None) -> RunConfig:
    """The configuration for a folder of this replica; what the user left open is shared by the replicas of a host."""
    budgets, given = config.budgets, dict[str, int]()
    if budgets.device_memory is None and device_bytes is not None:
        given["device_memory"] = device_bytes
    if budgets.host_memory is None:
        given["host_memory"] = max(MIB, default_host_bytes(process_bytes(), sharing))
    if budgets.disk is None:
        given["disk"] = free_disk(folder) * 9 // (10 * sharing)
    return config.model_copy(update={"run_dir": folder, "budgets": budgets.model_copy(update=given)})


class OwnPacks:
    """Samples and packs on this host; made by `open_own_packs`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.meta, self.row_bytes = run.graph.meta, _row_bytes(run.config, run.graph.meta)
        self.epoch_items = count_items(run.graph, "train", run.config.sampler.batch_size)
        self._in_memory = run.config.feed == "memory"
        self._splits: tuple[Split, ...] = own_splits(run) if self._in_memory else (*own_splits(run), "train")

    def plan(self) -> PackMode:
        """See Source."""
        self._plans = plan_splits(self._run, self._splits)
        if not self._in_memory:
            return read_summary(self._run, "train").mode
        return "rolling" if self._run.config.plan.mode == "rolling" else "reuse"

    def prepare(self, mode: PackMode) -> None:
        """See Source; what was planned for another mode, since `auto` found other disks elsewhere, is planned again."""
        run = self._run
        if not self._in_memory and read_summary(run, "train").mode != mode:
            plan = run.config.plan.model_copy(update={"mode": mode})
            run.config = run.config.model_copy(update={"plan": plan})
            self._plans |= plan_splits(run, ("train",))
        self._packs = pack_splits(run, self._splits, self._plans)
        self._feed = open_train_feed(run, self._packs.get("train"))

    def open_train(self, start: int, stop: int) -> AbstractContextManager[Iterable[MiniBatch]]:
        """See Source."""
        return self._feed.open(start, stop)

    def open_split(self, split: Split) -> AbstractContextManager[tuple[Iterable[MiniBatch], int]] | None:
        """See Source."""
        return self._opened(split) if split in self._packs else None

    @contextmanager
    def _opened(self, split: Split) -> Iterator[tuple[Iterable[MiniBatch], int]]:
        run, prepared = self._run, self._packs[split]
        with open_pack_feed(
            prepared.packs,
            run.graph,
            start_step=0,
            stop_step=prepared.summary.num_items,
            host_memory=run.evaluation_bytes,
            device=run.config.train.device,
            threads=run.threads,
        ) as feed:
            yield feed, prepared.summary.num_items

    def stats(self) -> FeedStats | None:
        """See Source."""
        return self._feed.stats()

    def queue_bytes(self) -> int | None:
        """See Source."""
        return None

    def facts(self) -> dict[str, Any]:
        """The plan, the seconds of every step of preparing, and what the process was predicted to take."""
        prepared = self._packs.get("train")
        plan = {} if prepared is None else {"plan": asdict(prepared.summary)}
        return {"prepared": dict(self._run.timings.spent), "memory": self._feed.memory, **plan}


@contextmanager
def open_own_packs(
    config: RunConfig, rank: int, replicas: int, *, sharing: int, device_bytes: int | None, progress: Progress
) -> Iterator[OwnPacks]:
    """Sample and pack this replica's items, or find that it is done; `sharing` replicas share this host, and
    `device_bytes` of the GPU are free for this one."""
    with ExitStack() as stack:
        if config.remote.dataset is not None:
            place = local_copy(config.remote.dataset, "datasets", config.remote.stage_dir)  # home folders may differ
            stack.enter_context(staged(config.remote.dataset, place, progress=progress))
            config = config.model_copy(update={"dataset": place})
        graph = open_graph(config.dataset)
        # how its splits were sampled, they say themselves: another experiment may find its packs here
        folder = stack.enter_context(own_folder(config, rank, replicas, {"graph": graph.fingerprint}))
        own = _share_of_host(config, folder, sharing, device_bytes)
        yield OwnPacks(Run(own, graph, progress, threading.Event(), rank=rank, replicas=replicas))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """What the driver tells replicas that feeders feed: where to ask for them, and what it knows of the graph."""

    directory: Address
    token: bytes
    meta: GraphMeta
    fingerprint: str
    items: dict[Split, int]

    def __repr__(self) -> str:
        return f"Fed(directory={self.directory})"


class FedItems:
    """Pulls what feeders make; needs no graph on this host. Made by `open_fed_items`."""

    def __init__(self, config: RunConfig, rank: int, replicas: int, fed: Fed, budgets: Budgets) -> None:
        self._config, self._rank, self._replicas, self._fed, self._budgets = config, rank, replicas, fed, budgets
        self.meta, self.epoch_items = fed.meta, fed.items["train"]
        self.row_bytes = _row_bytes(config, fed.meta)
        evaluates = config.evaluate.mode == "sampled"
        self._evaluation_bytes = int(budgets.host_bytes * config.evaluate.memory_share) if evaluates else 0
        self._train: Any = None

    def plan(self) -> PackMode:
        """See Source; feeders sample every epoch anew."""
        return "rolling"

    def prepare(self, mode: PackMode) -> None:
        """See Source; feeders do."""

    def open_train(self, start: int, stop: int) -> AbstractContextManager[Iterable[MiniBatch]]:
        """See Source."""
        return self._opened_train(start, stop)

    @contextmanager
    def _opened_train(self, start: int, stop: int) -> Iterator[Iterable[MiniBatch]]:
        host_bytes = self._budgets.host_bytes - self._evaluation_bytes
        with self._feed("train", start, stop, host_bytes, self._budgets.disk_bytes * 3 // 4) as pulled:
            self._train = pulled
            yield pulled.feed

    def open_split(self, split: Split) -> AbstractContextManager[tuple[Iterable[MiniBatch], int]] | None:
        """See Source."""
        if self._fed.items.get(split, 0) <= self._rank:
            return None
        return self._opened(split)

    @contextmanager
    def _opened(self, split: Split) -> Iterator[tuple[Iterable[MiniBatch], int]]:
        deal = deal_items(self._config, split, self._rank, self._replicas, self._fed.items[split])
        total = self._fed.items[split] if deal is None else deal.own_per_epoch
        with self._feed(split, 0, total, self._evaluation_bytes, self._budgets.disk_bytes // 4) as pulled:
            yield pulled.feed, total

    @contextmanager
    def _feed(self, split: Split, start: int, stop: int, host_bytes: int, disk_bytes: int) -> Iterator[Any]:
        config, fed = self._config, self._fed
        is_training = split == "train"
        plan = config.plan if is_training else config.plan.model_copy(update={"policy": "none"})
        device_bytes = self._budgets.device_bytes if is_training else 0
        find = partial(ask, fed.directory, fed.token)
        with (
            open_pulled_feed(
                find(),
                fed.token,
                sample=sample_config(config, split),
                plan=plan.model_copy(update={"mode": "rolling"}),
                budgets=Budgets(device_bytes=device_bytes, host_bytes=host_bytes, disk_bytes=disk_bytes),
                packs=config.run_dir / split / "packs",
                start_step=start,
                stop_step=stop,
                split=split,
                shuffle=is_training,
                deal=deal_items(config, split, self._rank, self._replicas, fed.items[split]),
                shares=self._replicas * 2,  # training and evaluation
                device=config.train.device,
                threads=config.train.threads,
                pace=Pace(timeout_s=config.cluster.timeout_s * _WINDOW_PATIENCE),
                refresh=find,  # the only feeder may have died, and its successor is on its way
            ) as pulled,
            followed(fed.directory, fed.token, pulled.puller),
        ):
            yield pulled

    def stats(self) -> FeedStats | None:
        """See Source."""
        found: FeedStats | None = None if self._train is None else self._train.feed.stats
        return found

    def queue_bytes(self) -> int | None:
        """See Source."""
        return 0 if self._train is None else int(self._train.puller.stats().queue_bytes)

    def facts(self) -> dict[str, Any]:
        """What was pulled."""
        if self._train is None:
            return {}
        return {"pulled": asdict(self._train.puller.stats())}


@contextmanager
def open_fed_items(
    config: RunConfig, rank: int, replicas: int, fed: Fed, *, sharing: int, device_bytes: int | None
) -> Iterator[FedItems]:
    """Be fed; see `open_own_packs`."""
    made_of = {"run": config.digest(), "graph": fed.fingerprint}  # what feeders sent has nothing else to say so
    with own_folder(config, rank, replicas, made_of) as folder:
        own = _share_of_host(config, folder, sharing, device_bytes)
        given = own.budgets
        budgets = default_budgets(
            folder,
            device_bytes=given.device_memory,
            host_bytes=given.host_memory or MIB,
            disk_bytes=given.disk,
        )
        yield FedItems(own, rank, replicas, fed, budgets)
