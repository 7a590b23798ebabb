"""Packing that is killed or runs out of disk: nothing is lost, and the bytes come out the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.sampler.journal import read_journal
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import Plan
from penstock.storage.errors import DoesNotFit
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import checksum_file
from penstock.storage.pack import is_complete
from penstock.storage.progress import Progress
from penstock.storage.trace import Trace, window_name

_PROGRAM = """
import sys
from pathlib import Path
from penstock.sampler.estimate import DiskRates
from penstock.sampler.packer import write_packs
from penstock.sampler.plan import PlanConfig, plan_packs
from penstock.storage.budget import Budgets
from penstock.storage.graph import open_graph
from penstock.storage.trace import open_trace

graph, trace = open_graph(Path(sys.argv[1])), open_trace(Path(sys.argv[2]))
plan = plan_packs(
    graph,
    trace,
    PlanConfig(mode="reuse", policy=sys.argv[4], row_dtype=sys.argv[5]),
    Budgets(device_bytes=0, host_bytes=64 << 20, disk_bytes=int(sys.argv[6])),
    disk_rates=DiskRates(read_bytes_per_s=1e9, write_bytes_per_s=1e9, random_reads_per_s=1e5),
    scratch=Path(sys.argv[3]).parent / "scratch",
)
print(plan.summary.layout, flush=True)
write_packs(plan, graph, trace, Path(sys.argv[3]), host_memory=int(sys.argv[7]), checkpoint_s=0)
print("done", flush=True)
"""


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: checksum_file(path) for path in sorted(folder.iterdir())}


def start(graph: GraphStore, trace: Trace, out: Path, *settings: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _PROGRAM, graph.path, trace.path, out, *settings]
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)


def smallest_memory(plan: Plan, graph: GraphStore, trace: Trace, out: Path) -> int:
    with pytest.raises(DoesNotFit) as caught:
        write_packs(plan, graph, trace, out, host_memory=1)
    return int(str(caught.value).split("--host-memory ")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dtype"), [("private", "float16"), ("shared", "float32")])
def test_packing_killed_at_random_moments_gives_the_same_bytes(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, tmp_path: Path, layout: str, dtype: str
) -> None:
    whole = make_plan(wide_graph, wide_trace, host=64 << 20, policy="none", row_dtype=dtype)
    disk = whole.summary.disk_needed_bytes * (45 if layout == "shared" else 100) // 100
    plan = make_plan(wide_graph, wide_trace, host=64 << 20, policy="none", row_dtype=dtype, mode="reuse", disk=disk)
    assert plan.summary.layout == layout
    memory = smallest_memory(plan, wide_graph, wide_trace, tmp_path / "refused") + 100_000
    started = time.monotonic()
    write_packs(plan, wide_graph, wide_trace, tmp_path / "whole", host_memory=memory, checkpoint_s=0)
    duration = time.monotonic() - started

    out, rng, kills = tmp_path / "killed", np.random.default_rng(5), 0
    settings = (out, "none", dtype, disk)
    for _ in range(8):
        given = int(rng.choice([memory, memory + 400_000, 16 << 20]))  # another budget after each kill
        process = start(wide_graph, wide_trace, *settings, given)
        assert process.stdout is not None and process.stdout.readline().strip() == layout
        time.sleep(float(rng.uniform(0.02, 0.6)) * duration)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    with start(wide_graph, wide_trace, *settings, 8 << 20) as process:
        assert process.communicate()[0].split() == [layout, "done"] and process.returncode == 0
    assert kills > 0 and is_complete(out)
    assert files_of(out) == files_of(tmp_path / "whole")


def note_into(reports: list[int]) -> Progress:
    """A progress that keeps how much was done."""

    def note(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        reports.append(done)

    return note


class Killed(Exception):
    """Stands for a kill at a chosen moment."""


def test_a_resumed_pass_goes_on_where_it_was(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, tmp_path: Path
) -> None:
    plan = make_plan(wide_graph, wide_trace, host=64 << 20, policy="none")
    memory = smallest_memory(plan, wide_graph, wide_trace, tmp_path / "refused") + 100_000
    calls = 0

    def stop_late(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed

    out = tmp_path / "packs"
    with pytest.raises(Killed):
        write_packs(plan, wide_graph, wide_trace, out, host_memory=memory, checkpoint_s=0, progress=stop_late)
    found = read_journal(out)
    assert found is not None and 0 < found[0].rows_done < wide_graph.num_nodes
    seen: dict[str, list[int]] = {"packs": [], "whole": []}
    for name, reports in seen.items():
        write_packs(plan, wide_graph, wide_trace, tmp_path / name, host_memory=memory, progress=note_into(reports))
    assert files_of(out) == files_of(tmp_path / "whole")
    assert seen["packs"] == seen["whole"][3:]  # the first three parts were not read again


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_finished_windows_and_packing_goes_on_later(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, tmp_path: Path, small_disk: Path
) -> None:
    plan = make_plan(wide_graph, wide_trace, host=64 << 20, policy="none")
    write_packs(plan, wide_graph, wide_trace, tmp_path / "whole", host_memory=8 << 20)
    out, filler = small_disk / "packs", small_disk / "filler"
    write_packs(plan, wide_graph, wide_trace, out, host_memory=8 << 20)
    (out / "manifest.json").unlink()
    for window in range(1, plan.meta.num_windows):
        (out / window_name(window, "json")).unlink()
        (out / window_name(window, "pack")).unlink()
    before = files_of(out)
    with open(filler, "wb") as file:
        with pytest.raises(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        file.truncate(file.tell() // 65536 * 65536 - (256 << 10))
    with pytest.raises(DoesNotFit, match="free"):
        write_packs(plan, wide_graph, wide_trace, out, host_memory=8 << 20)
    assert files_of(out) == before
    filler.unlink()
    write_packs(plan, wide_graph, wide_trace, out, host_memory=8 << 20)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_disk_that_fills_while_packing_is_told_and_survived(
    wide_graph: GraphStore, wide_trace: Trace, make_plan: Any, tmp_path: Path, small_disk: Path
) -> None:
    """Space is reserved first, so only the journal can still find the disk full: another program took the rest."""
    plan = make_plan(wide_graph, wide_trace, host=64 << 20, policy="none")
    memory = smallest_memory(plan, wide_graph, wide_trace, tmp_path / "refused") + 100_000
    out, filler = small_disk / "packs", small_disk / "filler"
    calls = 0

    def fill(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            with open(filler, "wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(DoesNotFit, match="disk is full"):
        write_packs(plan, wide_graph, wide_trace, out, host_memory=memory, checkpoint_s=0, progress=fill)
    filler.unlink()
    write_packs(plan, wide_graph, wide_trace, out, host_memory=memory, checkpoint_s=0)
    write_packs(plan, wide_graph, wide_trace, tmp_path / "whole", host_memory=memory, checkpoint_s=0)
    assert files_of(out) == files_of(tmp_path / "whole")
