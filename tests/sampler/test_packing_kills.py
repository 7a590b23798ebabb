"""Kills at every point of packing, with other memory after each: what is published is what a quiet run writes."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.sampler import packing_pass, segment_order
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import Plan
from penstock.sampler.streams import StreamWriter
from penstock.storage.directio import DirectFile
from penstock.storage.errors import DataError, DoesNotFit, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import checksum_file
from penstock.storage.pack import has_window, is_complete
from penstock.storage.trace import Trace, window_name

LAYOUTS = {"private": ("float16", 100), "shared": ("float32", 45)}  # row dtype, percent of the disk of private extents


class Killed(BaseException):
    """Stands for SIGKILL at a chosen moment: nothing of ours catches it."""


class Fuse:
    """Burns down with every call of what packing cannot do without, and then kills."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        for name in ("fsync", "fdatasync"):  # they matter to a power cut; a killed process leaves its pages behind
            monkeypatch.setattr(os, name, lambda fd: None)
        for module, name in (
            (packing_pass, "write_journal"),
            (packing_pass, "write_pack_index"),
            (packing_pass, "fsync_folder"),
            (packing_pass, "delete_journal"),
            (StreamWriter, "append"),
            (segment_order, "_write_safely"),
            (DirectFile, "write_from"),
        ):
            monkeypatch.setattr(module, name, self._burning(getattr(module, name)))

    def _burning(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def burn(*args: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return function(*args, **options)

        return burn


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: checksum_file(path) for path in sorted(folder.iterdir())}


def make(make_plan: Any, graph: GraphStore, trace: Trace, layout: str) -> Plan:
    dtype, percent = LAYOUTS[layout]
    options = {"host": 64 << 20, "policy": "none", "row_dtype": dtype, "mode": "reuse"}
    disk = make_plan(graph, trace, **options).summary.disk_needed_bytes * percent // 100
    plan: Plan = make_plan(graph, trace, disk=disk, **options)
    assert plan.summary is not None and plan.summary.layout == layout
    return plan


def smallest_memory(plan: Plan, graph: GraphStore, trace: Trace, out: Path) -> int:
    with pytest.raises(DoesNotFit) as caught:
        write_packs(plan, graph, trace, out, host_memory=1)
    return int(str(caught.value).split("--host-memory ")[1].split()[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_no_sequence_of_kills_with_other_memory_publishes_a_damaged_set(
    wide_graph: GraphStore,
    wide_trace: Trace,
    make_plan: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    seed: int,
) -> None:
    plan = make(make_plan, wide_graph, wide_trace, layout)
    least = smallest_memory(plan, wide_graph, wide_trace, tmp_path / "refused")
    fuse, rng = Fuse(monkeypatch), np.random.default_rng(seed)
    fuse.left = 1 << 30
    write_packs(plan, wide_graph, wide_trace, tmp_path / "whole", host_memory=64 << 20, checkpoint_s=0)
    expected, longest, kills = files_of(tmp_path / "whole"), (1 << 30) - fuse.left, 0
    for trial in range(6):
        out = tmp_path / f"killed-{trial}"
        while not is_complete(out):
            # one in four burns down close to the end, where windows are published
            late = rng.random() < 0.25
            fuse.left = int(rng.integers(longest - 20, longest)) if late else int(rng.integers(longest))
            try:
                memory = int(rng.choice([least, least + 200_000, 6 << 20, 64 << 20]))
                write_packs(plan, wide_graph, wide_trace, out, host_memory=memory, checkpoint_s=0)
            except Killed:
                kills += 1
        assert files_of(out) == expected
    assert kills >= 6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pass_goes_on_in_other_buffers(
    wide_graph: GraphStore,
    wide_trace: Trace,
    make_plan: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    layout: str,
) -> None:
    """More memory never makes a pass begin anew; less does where segments' buckets do not fit, and the log says so."""
    plan, out = make(make_plan, wide_graph, wide_trace, layout), tmp_path / "packs"
    small = smallest_memory(plan, wide_graph, wide_trace, tmp_path / "refused") + 200_000  # for all streams in one pass
    for first, second in ((small, 64 << 20), (64 << 20, small)):
        fuse = Fuse(monkeypatch)
        fuse.left = 60
        with pytest.raises(Killed):
            write_packs(plan, wide_graph, wide_trace, out / str(first), host_memory=first, checkpoint_s=0)
        monkeypatch.undo()
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="penstock"):
            write_packs(plan, wide_graph, wide_trace, out / str(first), host_memory=second)
        begins_anew = "begins anew" in caplog.text
        assert begins_anew == (layout == "shared" and second < first), caplog.text
    assert files_of(out / str(small)) == files_of(out / str(64 << 20))


def test_finished_windows_that_are_not_as_planned_are_packed_again(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan, out = make(make_plan, wide_graph, wide_trace, "private"), tmp_path / "packs"
    write_packs(plan, wide_graph, wide_trace, out, host_memory=8 << 20)
    expected, damaged = files_of(out), ["pack", "residents.npy", "json", "pack"]
    (out / "manifest.json").unlink()
    for window, suffix in enumerate(damaged):
        path = out / window_name(window, suffix)
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if window else 100] ^= 1
        path.write_bytes(data if window != 2 else data[:-20])
    (out / window_name(3, "wrap.npy")).unlink()
    with caplog.at_level(logging.WARNING, logger="penstock"):
        write_packs(plan, wide_graph, wide_trace, out, host_memory=8 << 20)
    assert all(f"window {window} of" in caplog.text for window in range(4))
    assert files_of(out) == expected


def test_unfinished_packs_of_another_budget_begin_anew(
    tiny_graph: GraphStore, small_trace: Trace, make_plan: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, out = make_plan(host=50_000), make_plan(host=60_000), tmp_path / "packs"
    assert first.meta.host_slots != second.meta.host_slots
    write_packs(first, tiny_graph, small_trace, out, host_memory=4 << 20)
    with pytest.raises(DataError, match="host_slots"):  # complete ones are not thrown away
        write_packs(second, tiny_graph, small_trace, out, host_memory=4 << 20)
    (out / "manifest.json").unlink()
    (out / window_name(1, "json")).unlink()
    with caplog.at_level(logging.WARNING, logger="penstock"):
        write_packs(second, tiny_graph, small_trace, out, host_memory=4 << 20)
    assert "begins anew" in caplog.text and "host_slots" in caplog.text
    write_packs(second, tiny_graph, small_trace, tmp_path / "whole", host_memory=4 << 20)
    assert files_of(out) == files_of(tmp_path / "whole") and has_window(out, 0)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_the_disk_damaged_between_two_runs_is_not_published(
    wide_graph: GraphStore,
    wide_trace: Trace,
    make_plan: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
) -> None:
    """One bit of what a killed run left, of any file and at any point of the pass: extents, buckets before they are
    sorted, their sorted copies, sorted segments, the journal."""
    plan = make(make_plan, wide_graph, wide_trace, layout)
    fuse, rng, flipped = Fuse(monkeypatch), np.random.default_rng(5), set()
    fuse.left = 1 << 30
    write_packs(plan, wide_graph, wide_trace, tmp_path / "whole", host_memory=64 << 20, checkpoint_s=0)
    expected, longest = files_of(tmp_path / "whole"), (1 << 30) - fuse.left
    scans, ends = np.linspace(10, longest - 30, 8).astype(int), np.arange(longest - 30, longest - 1)
    for trial, left in enumerate([*scans, *ends]):
        out = tmp_path / f"killed-{trial}"
        fuse.left = int(left)
        with pytest.raises(Killed):
            write_packs(plan, wide_graph, wide_trace, out, host_memory=64 << 20, checkpoint_s=0)
        there = [path for path in sorted(out.iterdir()) if path.suffix not in (".npy", ".json", ".tmp")]
        there = [path for path in there if path.stat().st_size]
        copies = [path for path in there if path.suffix == ".sorted"]
        path = copies[0] if copies and trial % 2 else there[int(rng.integers(len(there)))]
        data = np.memmap(path, np.uint8, "r+")
        data[int(rng.integers(len(data) // (1 + trial % 3)))] ^= 1 << int(rng.integers(8))
        del data
        flipped.add(path.suffix)
        fuse.left = 1 << 30
        try:
            write_packs(plan, wide_graph, wide_trace, out, host_memory=64 << 20, checkpoint_s=0)
        except FormatError as error:
            assert "run the same command again, it packs anew" in str(error)
            write_packs(plan, wide_graph, wide_trace, out, host_memory=64 << 20, checkpoint_s=0)
        assert files_of(out) == expected, (trial, path)
    assert {".partial", ".journal"} <= flipped and (".sorted" in flipped) == (layout == "shared")
