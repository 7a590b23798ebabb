"""What a store is built from, known by content: a copy of the inputs is the same inputs, whatever their times.

The checksum of a file is computed by reading it once. A file that is still the one that was read before is not read
again: the same inode, of the same size and times, that had not been touched for two seconds when it was read. A file
system cannot change the bytes of such a file and leave its change time as it was.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from penstock.storage.errors import DataError
from penstock.storage.progress import Progress

_CHUNK_BYTES = 4 << 20
_SETTLED_NS = 2_000_000_000  # the coarsest time stamps in use, those of FAT
Record: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """A file. `role` is what it is to the graph; `facts` are what its path says, such as the values of partitions."""

    role: str
    path: Path
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputDigest:
    """Something in memory, by the digest of its bytes."""

    role: str
    digest: str


Input: TypeAlias = InputFile | InputDigest


def _stamp(path: Path) -> tuple[int, list[int]]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error
    return stat.st_size, [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _settled(stamp: list[int]) -> bool:
    return max(stamp[-2:]) < time.time_ns() - _SETTLED_NS


def identify(
    inputs: Sequence[Input], seen: Mapping[str, Record], progress: Progress
) -> tuple[list[Record], dict[str, Record]]:
    """Describe inputs by content, and say what was seen of their files, to be given to the next call.

    DataError where a file cannot be read.
    """
    stamps = {file.role: _stamp(file.path) for file in inputs if isinstance(file, InputFile)}
    total, done = sum(size for size, _ in stamps.values()), 0
    records: list[Record] = []
    now_seen: dict[str, Record] = {}
    for item in inputs:
        if isinstance(item, InputDigest):
            records.append({"role": item.role, "xxh3": item.digest})
            continue
        size, stamp = stamps[item.role]
        before = seen.get(item.role)
        if before is not None and before["stamp"] == stamp:
            digest = before["xxh3"]
        else:
            digest = _digest(item.path, total, done, progress)
        if _settled(stamp):
            now_seen[item.role] = {"stamp": stamp, "xxh3": digest}
        records.append({"role": item.role, "bytes": size, "xxh3": digest, **item.facts})
        done += size
    return records, now_seen


def _digest(path: Path, total: int, done: int, progress: Progress) -> str:
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            buffer = bytearray(_CHUNK_BYTES)
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                done += count
                progress("checksum inputs", done, max(done, total), "bytes")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path") from error
    return str(digest.hexdigest())
