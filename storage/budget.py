"""Budgets in bytes: parse them, print them, derive defaults from the machine, measure against them."""

import ctypes
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from penstock.storage import cgroup
from penstock.storage.errors import DoesNotFit

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
Size = int | str  # bytes, or text like 4GiB, see `parse_bytes`
_TOO_LARGE = 1 << 60  # sums of a few of them are to stay within 64 bits
_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB, "T": GIB << 10}
_UNITS |= {f"{unit}IB": factor for unit, factor in _UNITS.items() if unit not in ("", "B")}
_UNITS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_bytes(text: int | str) -> int:
    """Read `4GiB`, `512M`, `1.5 GB` or a plain number; binary unless the unit is KB, MB, GB or TB.

    Raises ValueError for anything else, for negative sizes, and for those that no machine has.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", str(text))
    if not match or match[2].upper() not in _UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 512MiB, 4GiB or 1000000")
    size = float(match[1]) * _UNITS[match[2].upper()]
    if size >= _TOO_LARGE:
        raise ValueError(f"{text!r} is more than any machine has; write for example 512MiB, 4GiB or 1000000")
    return int(size)


def parse_memory(text: int | str) -> int:
    """`parse_bytes` of memory to work in; ValueError where it is less than a byte too."""
    size = parse_bytes(text)
    if size < 1:
        raise ValueError(f"{text!r} is no memory to work in; write for example 512MiB, 4GiB or 1000000")
    return size


def format_bytes(num_bytes: float) -> str:
    """Print a size with three significant digits in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} TiB"


def default_memory(fixed_bytes: int) -> int:
    """A power of two, at most what fits beside a process of `fixed_bytes`: mostly the same at the next call, which then
    finds what this one has made."""
    fitting = max(MIB, default_host_bytes(fixed_bytes))
    return 1 << (fitting.bit_length() - 1)


def default_disk(folder: Path) -> int:
    """A power of two that is free: mostly the same at the next call."""
    return 1 << max(0, free_disk(folder).bit_length() - 1)


def _address_space_left() -> int:
    """Bytes that `ulimit -v` lets this process map on top of what it has."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    unlimited = limit == resource.RLIM_INFINITY
    return cgroup.UNLIMITED if unlimited else max(0, limit - int(psutil.Process().memory_info().vms))


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    allowed = cgroup.memory_limit() if limit == resource.RLIM_INFINITY else min(limit, cgroup.memory_limit())
    return min(int(psutil.virtual_memory().total), allowed)


def available_memory() -> int:
    """Bytes of memory free now, within the limits of the container and of `ulimit -v`."""
    return min(int(psutil.virtual_memory().available), cgroup.memory_left(), _address_space_left())


def memory_room() -> int:
    """How large this process may become: what is free, and what it has already."""
    return available_memory() + rss_bytes()


def free_disk(path: Path) -> int:
    """Bytes free for us on the file system of `path` (or of its nearest existing parent)."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def num_threads() -> int:
    """Cores this process may run on (affinity and container quota counted, not the machine's cores)."""
    cores, quota = len(os.sched_getaffinity(0)), cgroup.cpu_limit()
    return cores if quota is None else max(1, min(cores, round(quota)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """What a run may use: memory of the device for rows, memory of the host for everything, disk for packs."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int


def default_host_bytes(fixed_bytes: int, sharing: int = 1) -> int:
    """Memory for tiers and buffers beside the `fixed_bytes` that a process takes, where `sharing` such are here.

    A container's memory is ours but for a twentieth, since sockets and page tables count; of what is free on a machine
    without limits others want at least half. Not positive where nothing is left.
    """
    free = available_memory() // sharing
    left = (rss_bytes() + free) * 19 // 20 - fixed_bytes
    contained = total_memory() < int(psutil.virtual_memory().total)
    return left if contained else min(left, free // 2)


def default_budgets(folder: Path, *, host_bytes: int, device_bytes: int | None, disk_bytes: int | None) -> Budgets:
    """Fill in what the user left open: no device tier, nine tenths of the free disk."""
    return Budgets(
        device_bytes=0 if device_bytes is None else device_bytes,
        host_bytes=host_bytes,
        disk_bytes=free_disk(folder) * 9 // 10 if disk_bytes is None else disk_bytes,
    )


def rss_bytes() -> int:
    """The resident size of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far (VmHWM), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * KIB
    return rss_bytes()


def children_peak_rss_bytes() -> int:
    """The largest resident size of any child process that has ended, in bytes; 0 where there was none."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * KIB


def reset_peak_rss() -> bool:
    """Start a new peak measurement; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def trim_heap() -> None:
    """Give memory that was freed back to the system, between two steps of a run that need different sizes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def require_free_disk(path: Path, num_bytes: int, purpose: str) -> None:
    """Raise DoesNotFit unless `num_bytes` are free at `path`, before anything is written."""
    free = free_disk(path)
    if free < num_bytes:
        raise DoesNotFit(
            f"{purpose} needs {format_bytes(num_bytes)} at {path}, where {format_bytes(free)} are free; "
            "free space or choose another folder"
        )
