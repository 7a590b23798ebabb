"""How far a packing pass is, so that a killed one goes on: one small file, replaced atomically.

Layout: int64 length of the JSON, the JSON, `StreamStates`, one record per stream, and xxh3-64 of all before. The bytes
of a stream lie in its window's file, the last page padded with zeros; they are synced before the journal says that they
are there, and compared with it before a pass goes on or publishes them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from penstock.storage.directio import PAGE, page_up
from penstock.storage.manifest import write_atomic

NAME = "packing.journal"
_SEAL_BYTES = 8
# Of STATE: of each stream what was appended, what conversion changed, and of a sorted bucket the sum of its pages.
StreamStates = NDArray[Any]
STATE = np.dtype([("position", "<i8"), ("xxh3", "<u8"), ("sorted", "<u8"), ("largest", "<f8"), ("total", "<f8")])


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """State of a pass over `windows` (of the plan with this digest) whose shared segments have buckets of so many rows.

    All rows of the feature table below `rows_done` are appended. `buckets_done` counts sorted buckets of shared
    segments, -1 while the table is still being scanned. Buffers may have any size, also another than before a kill.
    """

    plan: str
    windows: tuple[int, ...]
    bucket_rows: int
    rows_done: int = 0
    buckets_done: int = -1


def journal_bytes(num_streams: int) -> int:
    """Disk that a journal takes, twice, as it is replaced."""
    return 2 * page_up(PAGE + STATE.itemsize * num_streams)


def write_journal(folder: Path, journal: Journal, states: StreamStates) -> None:
    """Replace the journal; the files it speaks of must be synced."""
    text = json.dumps(asdict(journal)).encode()
    data = np.int64(len(text)).tobytes() + text + states.tobytes()
    write_atomic(folder / NAME, data + xxhash.xxh3_64_digest(data))


def read_journal(folder: Path) -> tuple[Journal, StreamStates] | None:
    """The journal and the states [S], or None where there is none that this release wrote, whole and undamaged."""
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return None
    data, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if xxhash.xxh3_64_digest(data) != seal:
        return None
    try:
        end = 8 + int(np.frombuffer(data, "<i8", 1)[0])
        value = json.loads(data[8:end])
        journal = Journal(**{**value, "windows": tuple(value["windows"])})
        return journal, np.frombuffer(data, STATE, offset=end).copy()
    except (ValueError, TypeError, KeyError):
        return None


def delete_journal(folder: Path) -> None:
    """The pass is over."""
    (folder / NAME).unlink(missing_ok=True)
