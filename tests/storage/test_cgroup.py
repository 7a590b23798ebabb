import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.storage import budget, cgroup

MIB = 1 << 20


def _container(folder: Path, mounts: list[str], own: str, files: dict[str, str]) -> Path:
    """Lay out what the kernel shows of a process, with groups under `folder`; returns its `/proc/self`."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    (proc / "cgroup").write_text(own)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return proc


def _v2(folder: Path, top: str = "/") -> list[str]:
    return [f"42 32 0:29 {top} {folder}/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate"]


def _v1(folder: Path, top: str = "/") -> list[str]:
    return [f"35 31 0:32 {top} {folder}/{name} rw,relatime - cgroup cgroup rw,{name}" for name in ("memory", "cpu")]


def test_the_smallest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    files = {
        "unified/memory.max": "max",
        "unified/pod/memory.max": str(300 * MIB),
        "unified/pod/app/memory.max": str(500 * MIB),
        "unified/pod/app/job/memory.max": "max",
    }
    proc = _container(tmp_path, _v2(tmp_path), "0::/pod/app/job\n", files)
    assert [group.path.name for group in cgroup.groups("memory", proc)] == ["job", "app", "pod", "unified"]
    assert cgroup.memory_limit(proc) == 300 * MIB


def test_throttling_is_a_limit_too(tmp_path: Path) -> None:
    files = {"unified/job/memory.max": str(500 * MIB), "unified/job/memory.high": str(400 * MIB)}
    assert cgroup.memory_limit(_container(tmp_path, _v2(tmp_path), "0::/job\n", files)) == 400 * MIB


def test_groups_of_version_one_nest_and_say_what_is_above_the_namespace(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "memory/outer/memory.limit_in_bytes": str(700 * MIB),
        "memory/outer/inner/memory.limit_in_bytes": str(900 * MIB),
        "memory/outer/inner/memory.stat": f"cache 5\nhierarchical_memory_limit {600 * MIB}",
    }
    own = "4:memory:/outer/inner\n3:cpu,cpuacct:/\n0::/\n"
    assert cgroup.memory_limit(_container(tmp_path, _v1(tmp_path), own, files)) == 600 * MIB


@pytest.mark.parametrize(("top", "own"), [("/docker/1a2b", "/docker/1a2b"), ("/", "/../../docker/1a2b"), ("/", "/")])
def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, top: str, own: str) -> None:
    files = {"memory/memory.limit_in_bytes": str(200 * MIB)}
    assert cgroup.memory_limit(_container(tmp_path, _v1(tmp_path, top), f"4:memory:{own}\n", files)) == 200 * MIB


def test_nothing_is_limited_where_nothing_is_said(tmp_path: Path) -> None:
    proc = _container(tmp_path, _v2(tmp_path) + _v1(tmp_path), "4:memory:/a\n0::/b\n", {})
    assert cgroup.memory_limit(proc) == cgroup.memory_left(proc) == cgroup.UNLIMITED
    assert cgroup.memory_peak(proc) is None and cgroup.cpu_limit(proc) is None
    assert cgroup.groups("memory", tmp_path / "no" / "proc") == []


@pytest.mark.parametrize("unified", [True, False])
def test_what_others_in_the_container_use_is_not_free(tmp_path: Path, unified: bool) -> None:
    name, limit, usage = ("unified", "max", "current") if unified else ("memory", "limit_in_bytes", "usage_in_bytes")
    prefix = "" if unified else "total_"
    files = {
        f"{name}/pod/memory.{limit}": str(1000 * MIB),
        f"{name}/pod/memory.{usage}": str(800 * MIB),
        f"{name}/pod/memory.stat": f"{prefix}active_file {100 * MIB}\n{prefix}inactive_file {200 * MIB}",
        f"{name}/pod/app/memory.{usage}": str(50 * MIB),
    }
    mounts, own = (_v2(tmp_path), "0::/pod/app\n") if unified else (_v1(tmp_path), "4:memory:/pod/app\n")
    assert cgroup.memory_left(_container(tmp_path, mounts, own, files)) == 500 * MIB


def test_the_smallest_cpu_quota_counts(tmp_path: Path) -> None:
    files = {"unified/pod/cpu.max": "150000 100000", "unified/pod/app/cpu.max": "max 100000"}
    assert cgroup.cpu_limit(_container(tmp_path, _v2(tmp_path), "0::/pod/app\n", files)) == 1.5


def test_a_cpu_quota_of_version_one_counts(tmp_path: Path) -> None:
    files = {"cpu/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}
    assert cgroup.cpu_limit(_container(tmp_path, _v1(tmp_path), "3:cpu,cpuacct:/a\n", files)) == 3


def _may_limit(group: cgroup.Group) -> bool:
    """Whether groups made below this one have limits of memory."""
    control = group.path / "cgroup.subtree_control"
    has = "memory" in control.read_text().split() if group.unified else True
    return has and os.access(group.path / "cgroup.procs", os.W_OK)


@contextmanager
def _nested_group(limit: int) -> Iterator[Path]:
    """A real group with a limit, and one below it without; skips where this machine has none to give."""
    tops = [group for group in cgroup.groups("memory") if _may_limit(group)]
    if not tops:
        pytest.skip("no control group of this machine may be written")
    outer = tops[-1].path / f"penstock-test-{os.getpid()}"
    try:
        (outer / "inner").mkdir(parents=True)
        (outer / ("memory.max" if tops[-1].unified else "memory.limit_in_bytes")).write_text(str(limit))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield outer / "inner"
    finally:
        (outer / "inner").rmdir()
        outer.rmdir()


def test_a_process_in_a_nested_group_knows_its_limit() -> None:
    program = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from penstock.storage.budget import memory_room, total_memory
print(total_memory(), memory_room())
"""
    with _nested_group(400 * MIB) as group:
        command = [sys.executable, "-c", program, str(group)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    total, room = (int(number) for number in found)
    assert total == 400 * MIB
    assert 300 * MIB < room <= 450 * MIB  # what the process has already is partly of the group it came from


def test_the_limit_of_the_address_space_counts() -> None:
    program = "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))\n"
    program += (
        "from penstock.storage.budget import available_memory, total_memory; print(total_memory(), available_memory())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    total, free = (int(number) for number in found)
    assert total == min(3 << 30, budget.total_memory()) and 0 < free < 3 << 30
