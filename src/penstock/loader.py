"""Mini-batches for a training loop of your own: sample, plan and pack a graph, and feed it out of core.

What is made lies in a folder of its own per split: `feed-train/` and so on. Like all that is derived it says what it
was made of, is found again by the next call, continued where it was cut off, and cleared where it is of something else.
"""

import shutil
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from pydantic import ValidationError

from penstock.claims import claim
from penstock.config import DEFAULT_FANOUTS
from penstock.disk_rates import disk_rates
from penstock.engine.feed import open_pack_feed
from penstock.engine.memory_feed import open_memory_feed
from penstock.engine.minibatch import MiniBatch
from penstock.engine.prefetch import Feed, FeedStats
from penstock.overrides import explain
from penstock.packed import packs_fit
from penstock.process_memory import process_bytes
from penstock.sampler.neighbors import Method, SampleConfig, count_items, estimate_trace_bytes, sample_trace
from penstock.sampler.packer import require_packing_memory, write_packs
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.sampler.producer import start_producer
from penstock.sampler.sizing import ROLLING_SHARE
from penstock.storage.budget import (
    Budgets,
    Size,
    default_disk,
    default_memory,
    num_threads,
    parse_bytes,
    parse_memory,
    trim_heap,
)
from penstock.storage.errors import InUse
from penstock.storage.graph import SPLITS, GraphStore, SeedSet, open_graph
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import PackMode, is_complete
from penstock.storage.paths import AnyPath
from penstock.storage.progress import Progress
from penstock.storage.remote.hostlock import flocked
from penstock.storage.trace import Trace
from penstock.watching import Show, shown

_SAMPLING_SHARE = 0.5  # of the memory; the topology itself is mapped
_TRACE_SHARE = 0.25  # of the disk: a longer trace is not written to look at whether its packs would fit
_MOST_EPOCHS = 1 << 20
OpenSteps = Callable[[int, int], AbstractContextManager[Feed]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOrder:
    """What is to be fed. `sampled_epochs` are drawn ahead and cycled where their packs fit the disk; else each of the
    `epochs` is drawn anew."""

    graph: GraphStore
    folder: Path
    split: SeedSet
    sample: SampleConfig
    plan: PlanConfig = PlanConfig()
    shuffle: bool
    sampled_epochs: int
    epochs: int | None
    budgets: Budgets
    device: str
    threads: int
    in_memory: bool = False
    progress: Show = None

    @property
    def items_per_epoch(self) -> int:
        """Mini-batches of an epoch."""
        return count_items(self.graph, self.split, self.sample.batch_size)

    @property
    def sampling_bytes(self) -> int:
        """Host memory that sampling may use."""
        return int(self.budgets.host_bytes * _SAMPLING_SHARE)


class Loader:
    """Hands out an epoch per loop, until it is closed; made by `open_feed`, and a context manager.

    `len()` is the number of mini-batches of an epoch. A batch is valid until the next one is taken: clone what is to
    live longer. A loop that is left in the middle ends its epoch; the next loop begins the next one.
    """

    def __init__(self, open_steps: OpenSteps, items_per_epoch: int, epochs: int | None, held: ExitStack) -> None:
        self._open_steps, self._items, self._epochs = open_steps, items_per_epoch, epochs
        self._step = self._begun = 0  # the next step of the open feed, and epochs
        self._feed: Feed | None = None
        self._opened = ExitStack()  # what the open feed needs
        held.push(self._opened)
        self._end = weakref.finalize(self, held.close)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return self._items

    def __repr__(self) -> str:
        return f"Loader({self._items:,} mini-batches per epoch, {self._begun} of {self._epochs or 'any'} epochs begun)"

    def __iter__(self) -> Iterator[MiniBatch]:
        if self._epochs is not None and self._begun >= self._epochs:
            raise ValueError(f"all epochs={self._epochs} have been fed; ask for more, or open the feed again")
        first = self._begun * self._items
        self._begun += 1
        feed = self._feed_from(first)
        for step in range(first, first + self._items):
            self._step = step + 1
            yield next(feed)

    def _feed_from(self, step: int) -> Feed:
        """The open feed where it is at a step, or a new one; it goes over the end of epochs, so that batches come
        ahead there too."""
        if not self._end.alive:
            raise ValueError("this loader is closed; open the feed again")
        if self._feed is None or self._step != step:
            self._opened.close()
            stop = self._items * (self._epochs or _MOST_EPOCHS)
            self._feed, self._step = self._opened.enter_context(self._open_steps(step, stop)), step
        return self._feed

    @property
    def stats(self) -> FeedStats | None:
        """What the open feed read, and from where; None before the first batch."""
        return None if self._feed is None else self._feed.stats

    def close(self) -> None:
        """End what runs in the background, and let others have the folder. A second call does nothing."""
        self._end()


def open_feed(
    graph: GraphStore | AnyPath,
    folder: AnyPath,
    *,
    split: SeedSet = "train",
    fanouts: Sequence[int] | None = None,
    num_neighbors: Sequence[int] | None = None,
    batch_size: int = 1024,
    method: Method = "uniform",
    degrees: bool = False,
    shuffle: bool | None = None,
    epochs: int | None = None,
    sampled_epochs: int | None = None,
    seed: int = 0,
    host_memory: Size | None = None,
    disk: Size | None = None,
    in_memory: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    progress: Show = None,
) -> Loader:
    """Open mini-batches of a graph for a loop of your own, out of core: `for batch in loader` is an epoch.

        with penstock.open_feed("papers.graph", "feeds", num_neighbors=[10, 10], host_memory="1GiB") as loader:
            for epoch in range(5):
                for batch in loader:
                    data = batch.to_pyg()  # or batch.to_dgl(), or batch.blocks and batch.features

    Sampling, planning and packing happen in this call, each step only where it is not done already; what they make lies
    in `folder`, in a folder per split. Features are read from there, never from the table at random. Without `with`,
    close the loader, or drop it.

    Args:
        graph: A graph store, or its folder.
        folder: Where packs go. Feeds of several splits may share it; two of the same split may not be open at once.
        split: Whose nodes are the seeds: `train`, `valid`, `test`, or `all` for every node.
        fanouts: Neighbours per layer, input side first (DGL's order); -1 takes all. Give these or `num_neighbors`;
            default: two hops of ten.
        num_neighbors: The same with the seeds' side first (PyG's order).
        batch_size: Seeds per mini-batch.
        method: `uniform`, or `labor` (layer-dependent draws, which read fewer rows).
        degrees: Give blocks the in-degrees of the whole graph (`src_degrees`).
        shuffle: Whether every epoch has its own order; default: of `train` only.
        epochs: How many epochs will be asked for; default: any number.
        sampled_epochs: Epochs drawn ahead and cycled where their packs fit the disk; default: 2 of `train`, 1 of
            others. Where they do not fit, every epoch is drawn anew in the background, ahead of the loop.
        seed: Of the draws and the order: the same seed gives the same mini-batches, whatever the budgets.
        host_memory: Bytes, or text like `4GiB`, that sampling, packing and this feed may use beside the process and
            your model; default: a power of two that fits half of what is free.
        disk: Bytes, or text, for packs; default: a power of two that is free.
        in_memory: Hold all features in memory instead; the same mini-batches.
        device: Where batches are handed out: `cpu` or `cuda`.
        threads: Default: the cores that this process may use.
        progress: Shows how far preparation is; as of `penstock.train`.

    Raises ValueError for what cannot be, DataError for bad data, DoesNotFit for budgets that are too small, naming ones
    that would do, InUse where the feed of this split is open elsewhere.
    """
    if split not in (*SPLITS, "all"):
        raise ValueError(f"split={split!r} is none of {', '.join(SPLITS)}, all")
    opened = graph if isinstance(graph, GraphStore) else open_graph(graph)
    if fanouts is None and num_neighbors is None:
        fanouts = DEFAULT_FANOUTS
    sampling = {"fanouts": fanouts, "num_neighbors": num_neighbors, "batch_size": batch_size, "method": method}
    try:
        sample = SampleConfig.model_validate({**sampling, "degrees": degrees, "seed": seed})
    except ValidationError as error:
        raise ValueError(explain(error, SampleConfig)) from error
    place = Path(folder) / f"feed-{split}"
    is_train = split == "train"
    return open_loader(
        FeedOrder(
            graph=opened,
            folder=place,
            split=split,
            sample=sample,
            shuffle=is_train if shuffle is None else shuffle,
            sampled_epochs=sampled_epochs or (2 if is_train else 1),
            epochs=epochs,
            budgets=Budgets(
                device_bytes=0,
                host_bytes=default_memory(process_bytes()) if host_memory is None else parse_memory(host_memory),
                disk_bytes=default_disk(place) if disk is None else parse_bytes(disk),
            ),
            device=device,
            threads=num_threads() if threads is None else threads,
            in_memory=in_memory,
            progress=progress,
        )
    )


def open_loader(order: FeedOrder) -> Loader:
    """Prepare what an order asks for, or find that it is there, and feed it; see `open_feed`."""
    order.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(flocked(order.folder / ".lock"))
        except BlockingIOError as error:
            raise InUse(f"{order.folder} is in use by {error}; wait for it, or choose another folder") from None
        with shown(order.progress) as show:
            open_steps = _from_memory(order, show) if order.in_memory else _from_disk(order, show)
        return Loader(open_steps, order.items_per_epoch, order.epochs, stack.pop_all())


def _claim(order: FeedOrder) -> None:
    """Keep in the folder what is of this graph, drawn so, and within these budgets."""
    free = {"fanouts", "num_neighbors", "mode", "window_items"}
    made_of = {
        "graph": order.graph.fingerprint,
        "split": order.split,
        "fanouts": list(order.sample.layer_fanouts),
        "epochs": order.sampled_epochs,
        "shuffle": order.shuffle,
        **order.sample.model_dump(mode="json", exclude=free),
    }
    under = {"plan": order.plan.model_dump(mode="json"), "in_memory": order.in_memory} | asdict(order.budgets)
    claim(order.folder, made_of, under, kept=("trace",), still_good=lambda: _still_fits(order))


def _still_fits(order: FeedOrder) -> bool:
    """Whether complete packs that were made under other terms will do."""
    if order.in_memory or not (order.folder / "plan.json").is_file():
        return False
    return packs_fit(order.folder, order.graph, order.plan, order.budgets)


def _sample(order: FeedOrder, show: Progress) -> Trace:
    return sample_trace(
        order.graph,
        order.folder / "trace",
        order.sample,
        split=order.split,
        shuffle=order.shuffle,
        num_epochs=order.sampled_epochs,
        host_memory=order.sampling_bytes,
        threads=order.threads,
        progress=show,
    )


def _from_memory(order: FeedOrder, show: Progress) -> OpenSteps:
    _claim(order)
    trace = _sample(order, show)

    def open_steps(start: int, stop: int) -> Feed:
        return open_memory_feed(
            order.graph,
            trace,
            start_step=start,
            stop_step=stop,
            row_dtype=order.plan.row_dtype,
            device=order.device,
            threads=order.threads,
        )

    return open_steps


def _from_disk(order: FeedOrder, show: Progress) -> OpenSteps:
    _claim(order)
    mode = _prepare(order, show)
    order.graph.drop_mapped()
    trim_heap()
    return _from_packs(order) if mode == "reuse" else _from_producer(order)


def _prepare(order: FeedOrder, show: Progress) -> PackMode:
    """Sample, plan and pack, or find that it is done; nothing is made ahead where windows are to roll."""
    plan_file, packs = order.folder / "plan.json", order.folder / "packs"
    if plan_file.is_file():
        mode: PackMode = read_json(plan_file, keys=("mode",))["mode"]
        if mode == "rolling" or is_complete(packs):
            return mode
    trace_bytes = estimate_trace_bytes(
        order.graph, order.sample, order.split, order.sampled_epochs, host_memory=order.sampling_bytes
    )
    if order.plan.mode == "rolling" or trace_bytes > order.budgets.disk_bytes * _TRACE_SHARE:
        write_json(plan_file, {"mode": "rolling"})
        return "rolling"
    trace = _sample(order, show)
    plan = plan_packs(
        order.graph,
        trace,
        order.plan,
        order.budgets,
        disk_rates=disk_rates(order.folder),
        scratch=order.folder / "plan",
        progress=show,
    )
    require_packing_memory(plan, order.budgets.host_bytes)
    write_json(plan_file, plan.summary_json())
    if plan.mode == "reuse":
        write_packs(plan, order.graph, trace, packs, host_memory=order.budgets.host_bytes, progress=show)
    for scratch in ("trace", "plan"):
        shutil.rmtree(order.folder / scratch, ignore_errors=True)
    return plan.mode


def _from_packs(order: FeedOrder) -> OpenSteps:
    def open_steps(start: int, stop: int) -> Feed:
        return open_pack_feed(
            order.folder / "packs",
            order.graph,
            start_step=start,
            stop_step=stop,
            host_memory=order.budgets.host_bytes,
            device=order.device,
            threads=order.threads,
        )

    return open_steps


def _from_producer(order: FeedOrder) -> OpenSteps:
    """Windows are made ahead of the loop by a process of its own, and deleted behind it."""

    @contextmanager
    def open_steps(start: int, stop: int) -> Iterator[Feed]:
        packs = order.folder / "packs"
        with (
            start_producer(
                order.graph.path,
                packs,
                order.sample,
                order.plan.model_copy(update={"mode": "rolling"}),
                order.budgets,
                start_step=start,
                stop_step=stop,
                split=order.split,
                shuffle=order.shuffle,
                threads=1,
            ) as producer,
            open_pack_feed(
                packs,
                order.graph,
                start_step=start,
                stop_step=stop,
                host_memory=int(order.budgets.host_bytes * ROLLING_SHARE),
                device=order.device,
                threads=order.threads,
                producer_check=producer.check,
                start_over=producer.start_over,
                delete_behind=True,
            ) as feed,
        ):
            yield feed

    return open_steps
