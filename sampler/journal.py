"""How far a packing pass is, so that a killed one goes on: one small file, replaced atomically.

Layout: int64 length of the JSON, the JSON, then one page per stream with the bytes after its last whole page. What the
journal says is on disk was synced before it was written.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.sampler.row_source import Tally
from penstock.storage.directio import PAGE
from penstock.storage.manifest import write_atomic

NAME = "packing.journal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """State of a pass over `windows` (of the plan with this digest) in parts of `part_rows`.

    `buckets_done` counts sorted buckets of shared segments, -1 while parts are still being scanned. `tallies` tell
    what conversion changed so far, per gathering thread.
    """

    plan: str
    windows: tuple[int, ...]
    part_rows: int
    bucket_rows: int
    parts_done: int = 0
    buckets_done: int = -1
    tallies: tuple[Tally, ...] = ()

    def same_pass(self, other: "Journal") -> bool:
        """Whether both speak of the same pass."""
        blank = {"parts_done": 0, "buckets_done": -1, "tallies": ()}
        return asdict(self) | blank == asdict(other) | blank


def write_journal(folder: Path, journal: Journal, tails: NDArray[np.uint8]) -> None:
    """Replace the journal; the files it speaks of must be synced."""
    text = json.dumps(asdict(journal)).encode()
    write_atomic(folder / NAME, np.int64(len(text)).tobytes() + text + tails.tobytes())


def read_journal(folder: Path) -> tuple[Journal, NDArray[np.uint8]] | None:
    """The journal and the tails [S, PAGE], or None where there is none or it is damaged."""
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return None
    try:
        end = 8 + int(np.frombuffer(data, "<i8", 1)[0])
        value = json.loads(data[8:end])
        tallies = tuple((float(most), float(total), int(rows)) for most, total, rows in value["tallies"])
        journal = Journal(**{**value, "windows": tuple(value["windows"]), "tallies": tallies})
        return journal, np.frombuffer(data, np.uint8, offset=end).reshape(-1, PAGE)
    except (ValueError, TypeError, KeyError):
        return None


def delete_journal(folder: Path) -> None:
    """The pass is over."""
    (folder / NAME).unlink(missing_ok=True)
