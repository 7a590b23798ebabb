"""What the container allows: limits of control groups (version 1 and 2), of this process's group and of all above it.

A limit of a group holds for everything below it, so the smallest counts. Files are those of the kernel's
`Documentation/admin-guide/cgroup-v2.rst` and `cgroup-v1/memory.rst`; a group that cannot be seen from inside a
namespace still shows in version 1's `hierarchical_memory_limit`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62  # version 1 writes 2^63 less a page, version 2 writes `max`


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A group's folder, and whether it is of version 2."""

    path: Path
    unified: bool


def _read(path: Path) -> str:
    """What a file of the kernel says; empty where it has no such file, or we may not read it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> int:
    return min(UNLIMITED, int(text)) if text.isdigit() else UNLIMITED


def _mounts(controller: str, proc: Path) -> Iterator[tuple[bool, str, Path]]:
    """(unified, the group at the top of the mount, where it is mounted) of every hierarchy with the controller."""
    for line in _read(proc / "mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(), after.split() or [""]
        if kind == "cgroup2" or (kind == "cgroup" and controller in rest[-1].split(",")):
            top, where = (field.replace("\\040", " ") for field in fields[3:5])
            yield kind == "cgroup2", top, Path(where)


def _own_path(unified: bool, controller: str, proc: Path) -> str | None:
    for line in _read(proc / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if (number == "0" and not controllers) if unified else controller in controllers.split(","):
            return path
    return None


def groups(controller: str, proc: Path = Path("/proc/self")) -> list[Group]:
    """This process's groups that have the controller, and all above them that can be seen, innermost first."""
    found = []
    for unified, top, where in _mounts(controller, proc):
        path = _own_path(unified, controller, proc)
        if path is None:
            continue
        # a mount may show a part of the hierarchy only, and a path may lead out of it
        inside = path == top or top == "/" or path.startswith(top + "/")
        names = path.removeprefix("" if top == "/" else top).strip("/").split("/") if inside else []
        names = [] if ".." in names else [name for name in names if name]
        found += [Group(path=where.joinpath(*names[:count]), unified=unified) for count in range(len(names), -1, -1)]
    return found


def _group_limit(group: Group) -> int:
    if group.unified:
        return min(_number(_read(group.path / name)) for name in ("memory.max", "memory.high"))
    limit = _number(_read(group.path / "memory.limit_in_bytes"))
    return min(limit, _number(_stat(group.path).get("hierarchical_memory_limit", "")))


def _stat(path: Path) -> dict[str, str]:
    pairs = (line.split() for line in _read(path / "memory.stat").splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _used(group: Group) -> int:
    """Bytes of a group, and of those below it, that the kernel cannot take back: all but page cache."""
    text = _read(group.path / ("memory.current" if group.unified else "memory.usage_in_bytes"))
    stat, prefix = _stat(group.path), "" if group.unified else "total_"
    cached = sum(int(stat.get(f"{prefix}{name}_file", 0)) for name in ("active", "inactive"))
    return max(0, int(text) - cached) if text.isdigit() else 0


def memory_limit(proc: Path = Path("/proc/self")) -> int:
    """The smallest memory limit of the groups; `UNLIMITED` where there is none."""
    return min((_group_limit(group) for group in groups("memory", proc)), default=UNLIMITED)


def memory_left(proc: Path = Path("/proc/self")) -> int:
    """Bytes that the groups' limits leave for more, page cache not counted; `UNLIMITED` where there is no limit."""
    limits = ((_group_limit(group), group) for group in groups("memory", proc))
    return min((max(0, limit - _used(group)) for limit, group in limits if limit < UNLIMITED), default=UNLIMITED)


def memory_peak(proc: Path = Path("/proc/self")) -> int | None:
    """The most that this process's own group ever used, page cache counted; None where the kernel does not say."""
    for group in groups("memory", proc):
        text = _read(group.path / ("memory.peak" if group.unified else "memory.max_usage_in_bytes"))
        if text.isdigit():
            return int(text)
    return None


def cpu_limit(proc: Path = Path("/proc/self")) -> float | None:
    """The smallest number of cores that the groups' quotas allow; None where there is none."""
    found = []
    for group in groups("cpu", proc):
        if group.unified:
            quota, _, period = _read(group.path / "cpu.max").partition(" ")
        else:
            quota, period = (_read(group.path / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)
