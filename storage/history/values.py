"""How the rows of a history lie in bytes: float32, bfloat16 (as uint16) or float64."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.runs import decode_bfloat16, encode_bfloat16

HistoryDtype = Literal["float32", "bfloat16", "float64"]
POISON = 0xFF  # a value of these bytes is NaN, in every dtype
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
}
_PIECE = 1 << 16  # values that are blended at a time: small enough for the cache, and the memory that it takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Rows of `dtype`; `array_dtype` is what NumPy sees of them. float64 is for oracles."""

    dtype: HistoryDtype

    @property
    def array_dtype(self) -> np.dtype[Any]:
        """The dtype of stored rows."""
        return _STORED[self.dtype]

    @property
    def wide(self) -> np.dtype[Any]:
        """The dtype that callers compute in."""
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @property
    def is_plain(self) -> bool:
        """Whether rows are stored as callers compute in them."""
        return self.array_dtype == self.wide

    def encode(self, rows: NDArray[Any], stored: NDArray[Any]) -> None:
        """Write `rows` [n, width] to `stored` [n * width]; bfloat16 rounds to nearest, ties to even."""
        if self.dtype == "bfloat16":
            bits = np.ascontiguousarray(rows, np.float32).view(np.uint32).reshape(-1)
            encode_bfloat16(bits, stored, 0, len(stored))
        else:
            stored.reshape(rows.shape)[...] = rows

    def decode(self, stored: NDArray[Any], out: NDArray[Any]) -> None:
        """Write `stored` [n * width] to `out` [n, width], C-contiguous, exactly."""
        if self.dtype == "bfloat16":
            decode_bfloat16(stored, out.view(np.uint32).reshape(-1), 0, len(stored))
        else:
            out.reshape(-1)[...] = stored

    def blend(self, source: NDArray[Any], target: NDArray[Any], share: float) -> None:
        """Make `target` [n] share * source + (1 - share) * target, computed in `wide`, in place.

        A share of 1 copies the bits of `source`, and a share of 0 leaves `target`, whatever the other one holds.
        """
        if share == 0:
            return
        if share == 1:
            target[:] = source
            return
        keep, take = self.wide.type(1 - share), self.wide.type(share)
        one, other = np.empty(min(_PIECE, len(source)), self.wide), np.empty(min(_PIECE, len(source)), self.wide)
        for lo in range(0, len(source), _PIECE):
            num = min(_PIECE, len(source) - lo)
            self.decode(source[lo : lo + num], one[:num])
            self.decode(target[lo : lo + num], other[:num])
            one[:num] *= take
            other[:num] *= keep
            one[:num] += other[:num]
            self.encode(one[:num], target[lo : lo + num])

    def check_rows(self, rows: NDArray[Any], shape: tuple[int, int], what: str) -> None:
        """ValueError unless `rows` has this shape, and the dtype that the values are computed in."""
        if rows.shape != shape or rows.dtype != self.wide:
            raise ValueError(f"{what} takes {self.wide.name} {shape}, not {rows.dtype.name} {rows.shape}")
