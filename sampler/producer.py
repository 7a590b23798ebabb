"""The process that makes rolling windows: start it, watch it, end it.

It writes `error.json` when it fails, so that the consumer learns why, and ends itself when its parent is gone.
"""

import logging
import os
import shutil
import subprocess
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.sampler.rolling import clear_windows, produce_windows
from penstock.storage.budget import Budgets
from penstock.storage.children import start_child
from penstock.storage.deal import Deal
from penstock.storage.errors import DataError, DoesNotFit, FormatError, Outgrown
from penstock.storage.graph import SeedSet
from penstock.storage.manifest import read_json, write_json

_ERROR = "error.json"
_WATCH_S = 0.5
_STOP_S = 10.0
_BUDGETS: dict[str, type[DoesNotFit]] = {"DoesNotFit": DoesNotFit, "Outgrown": Outgrown}
_KINDS: dict[str, type[Exception]] = {"DataError": DataError, "FormatError": FormatError}


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What to produce; sent to the process."""

    graph: Path
    out: Path
    sample: SampleConfig
    plan: PlanConfig
    budgets: Budgets
    start_step: int
    stop_step: int
    split: SeedSet
    shuffle: bool
    deal: Deal | None
    threads: int


def _end_with(parent: int) -> None:
    """End this process once its parent is another: packing survives a kill at any point."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def _work(_: Connection, parent: int, order: Order) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        produce_windows(
            order.graph,
            order.out,
            order.sample,
            order.plan,
            order.budgets,
            start_step=order.start_step,
            stop_step=order.stop_step,
            split=order.split,
            shuffle=order.shuffle,
            deal=order.deal,
            threads=order.threads,
        )
    except Exception as error:
        report: dict[str, object] = {"kind": type(error).__name__, "message": str(error)}
        report["traceback"] = traceback.format_exc()
        report |= {name: getattr(error, name, None) for name in ("host_bytes", "disk_bytes")}
        write_json(order.out / _ERROR, report)
        raise SystemExit(1) from error


class Producer:
    """A running producer; a context manager that stops it. `check` may be called from any thread."""

    def __init__(self, order: Order) -> None:
        self._order, self.out = order, order.out
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that is at work now."""
        return self._process.pid

    def _start(self) -> None:
        self._process, connection = start_child(_work, self._order)
        connection.close()

    def __enter__(self) -> "Producer":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.stop()

    def check(self) -> None:
        """Raise what ended the producer, if it failed; RuntimeError where it died without a word."""
        if (self.out / _ERROR).is_file():
            report = read_json(self.out / _ERROR)
            logging.getLogger(__name__).debug("the producer failed:\n%s", report["traceback"])
            message = f"the producer of rolling windows failed: {report['message']}"
            if report["kind"] in _BUDGETS:
                sizes = {name: report[name] for name in ("host_bytes", "disk_bytes")}
                raise _BUDGETS[report["kind"]](message, **sizes)
            raise _KINDS.get(report["kind"], RuntimeError)(message)
        code = self._process.poll()
        if code:
            raise RuntimeError(
                f"the producer of rolling windows in {self.out} died with exit code {code} (negative: killed by that "
                "signal, -9 often for lack of memory); resume the run, with less --host-memory if it happens again"
            )

    def wait_until_ready(self) -> None:
        """Return when the pack set can be opened; raises what ended the process before that."""
        while not (self.out / "packset.json").is_file():
            with suppress(Outgrown):  # its pack set is there meanwhile, and the feed will come to it
                self.check()
            time.sleep(0.02)

    def start_over(self, step: int) -> None:
        """Make windows from `step` on, knowing what ended the process that made them before."""
        self.stop()
        self._order = replace(self._order, start_step=step)
        clear_windows(self.out)
        self._start()
        self.wait_until_ready()

    def stop(self) -> None:
        """End the process, and delete its scratch; a second call does nothing."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for name in ("traces", "scratch", "probe"):
            shutil.rmtree(self.out / name, ignore_errors=True)


def start_producer(
    graph: Path,
    out: Path,
    sample: SampleConfig,
    plan: PlanConfig,
    budgets: Budgets,
    *,
    start_step: int,
    stop_step: int,
    split: SeedSet = "train",
    shuffle: bool = True,
    deal: Deal | None = None,
    threads: int = 1,
) -> Producer:
    """Start producing into the folder `out`, which is cleared; returns when the pack set can be opened.

    Raises what the producer raises before that.
    """
    clear_windows(out)
    order = Order(
        graph=graph,
        out=out,
        sample=sample,
        plan=plan,
        budgets=budgets,
        start_step=start_step,
        stop_step=stop_step,
        split=split,
        shuffle=shuffle,
        deal=deal,
        threads=threads,
    )
    producer = Producer(order)
    try:
        producer.wait_until_ready()
    except BaseException:
        producer.stop()
        raise
    return producer
