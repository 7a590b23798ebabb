"""Rows of the feature table as packs want them: gathered from a part, and re-encoded where the formats differ."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.pack import convert_rows, gather_words
from penstock.sampler.part_reader import Part
from penstock.storage.errors import DataError
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import open_packset
from penstock.storage.rows import ROW_DTYPES, RowFormat


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """What re-encoding changed: largest and mean absolute difference over all values packed."""

    max_abs: float
    mean_abs: float


_ERROR_FILE = "row_error.json"


def write_row_error(folder: Path, windows: Mapping[int, tuple[float, float, int]]) -> None:
    """Record per window the largest and the sum of all differences, and the rows; other windows' records stay."""
    path = folder / _ERROR_FILE
    found = read_json(path) if path.exists() else {}
    found |= {str(n): {"max": largest, "sum": total, "rows": rows} for n, (largest, total, rows) in windows.items()}
    write_json(path, found)


def read_row_error(folder: Path) -> RowError | None:
    """What packing in another row format changed; None where rows are packed as stored, or none is packed.

    Rows that are resident from the start are read from the feature table; they change alike and are not counted.
    """
    path = folder / _ERROR_FILE
    if not path.exists():
        return None
    windows = list(read_json(path).values())
    values = sum(entry["rows"] for entry in windows) * open_packset(folder).width
    if values == 0:
        return None
    return RowError(
        max_abs=max(entry["max"] for entry in windows),
        mean_abs=sum(entry["sum"] for entry in windows) / values,
    )


class RowSource:
    """Copies rows of a part into bytes of a pack, and tallies what a change of format does to them. For one thread."""

    def __init__(self, stored: RowFormat, packed: RowFormat, chunk_rows: int) -> None:
        self.stored, self.packed = stored, packed
        converts = stored != packed
        self._gathered = np.empty((chunk_rows if converts else 0, stored.row_bytes), np.uint8)
        self._scratch = np.empty((2, stored.width), np.float32)

    @property
    def lossy(self) -> bool:
        """Whether packed rows may differ from stored ones."""
        return self.stored != self.packed

    def copy(self, part: Part, ids: NDArray[Any], out: NDArray[np.uint8], error: NDArray[np.float64]) -> None:
        """Put rows `ids`, ascending and within the part, into `out`, their bytes laid end to end.

        Raises `error` float64 [2] to the largest absolute difference, and adds all of them to its second value.
        DataError where a value exceeds float16.
        """
        if not self.lossy:
            _gather(part, ids, self.stored.row_bytes, out)
            return
        rows = self._gathered[: len(ids)]
        _gather(part, ids, self.stored.row_bytes, rows.reshape(-1))
        codes = [ROW_DTYPES.index(f.dtype) for f in (self.stored, self.packed)]
        target = out.reshape(len(ids), self.packed.row_bytes)
        done = convert_rows(rows, codes[0], target, codes[1], self.stored.width, self._scratch, error)
        if done < len(ids):
            worst = float(np.abs(self._scratch[0]).max())
            raise DataError(
                f"node {int(ids[done])} has a feature of magnitude {worst:g}, which exceeds float16's 65504; "
                "pack as bfloat16 or float32"
            )


def _gather(part: Part, ids: NDArray[Any], row_bytes: int, out: NDArray[np.uint8]) -> None:
    word = np.dtype(f"u{math.gcd(row_bytes, 8)}")  # rows and buffers start at multiples of it
    table = part.data[: (part.hi - part.lo) * row_bytes].view(word)
    gather_words(table, part.lo, row_bytes // word.itemsize, ids, out.view(word), 0, len(ids))
