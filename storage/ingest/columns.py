"""Columns that are read front to back: arrays in memory or mapped, members of `.npz`, compressed CSV."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pc
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.npyfile import drop_pages


class ArrayColumn:
    """An array, mapped or in memory."""

    def __init__(self, name: str, array: NDArray[Any]) -> None:
        self.name, self.shape, self._array = name, array.shape, array

    def chunks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Copies of consecutive rows; the pages of a mapped array are dropped behind them."""
        for lo in range(0, len(self._array), rows):
            part = np.array(self._array[lo : lo + rows])
            drop_pages(self._array)
            yield part


def open_array(path: Path) -> NDArray[Any]:
    """Map the user's `.npy`; DataError where it cannot be read."""
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as .npy ({error}); write it again") from error
    return array


class NpzColumn:
    """A member of an `.npz`, decompressed on the way; `row` picks one of its rows, as of an edge index [2, E]."""

    def __init__(self, path: Path, member: str, row: int | None = None) -> None:
        self.name = f"{path}:{member}" if row is None else f"{path}:{member}[{row}]"
        self._path, self._member, self._row = path, f"{member}.npy", row
        try:
            with zipfile.ZipFile(path) as archive, archive.open(self._member) as file:
                self.whole_shape, self._dtype = self._header(file)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: {member} cannot be read ({error}); download or write it again") from error
        if row is not None and len(self.whole_shape) != 2:
            raise DataError(f"{path}: {member} has shape {self.whole_shape}, wanted two dimensions")
        self.shape = self.whole_shape if row is None else self.whole_shape[1:]

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError("it holds objects; save numbers")
        if fortran and len(shape) > 1:
            raise ValueError("it is in Fortran order; save numpy.ascontiguousarray of it")
        return shape, dtype

    def chunks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Consecutive rows."""
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self._dtype.itemsize
        with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as file:
            self._header(file)
            self._skip(file, (self._row or 0) * self.shape[0] * row_bytes)
            for lo in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - lo)
                data = file.read(count * row_bytes)
                if len(data) != count * row_bytes:
                    raise DataError(f"{self.name} ends after row {lo}; download it again")
                yield np.frombuffer(data, self._dtype).reshape(count, *self.shape[1:])

    def _skip(self, file: IO[bytes], num_bytes: int) -> None:
        while num_bytes:  # a compressed stream has no seek that is cheaper
            num_bytes -= len(file.read(min(num_bytes, 1 << 20))) or num_bytes


class CsvColumn:
    """A CSV without header, optionally compressed, as numbers [n, width]; `pick` takes one of its columns, as [n]."""

    def __init__(self, path: Path, dtype: Any, num_rows: int, pick: int | None = None) -> None:
        self.name = str(path) if pick is None else f"{path}, column {pick}"
        self._path, self._dtype, self._pick = path, np.dtype(dtype), pick
        self._width = self._first_width()
        self.shape: tuple[int, ...] = (num_rows,) if pick is not None else (num_rows, self._width)

    def _open(self, types: dict[str, pa.DataType] | None) -> Any:
        try:
            return pc.open_csv(
                self._path,
                read_options=pc.ReadOptions(autogenerate_column_names=True, block_size=1 << 20, use_threads=False),
                convert_options=pc.ConvertOptions(column_types=types),
            )
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._path} cannot be read as CSV ({error}); download it again") from error

    def _first_width(self) -> int:
        with self._open(None) as reader:
            return len(reader.schema.names)

    def chunks(self, rows: int) -> Iterator[NDArray[Any]]:
        """Consecutive rows, whatever the blocks of the file."""
        names = [f"f{n}" for n in range(self._width)]
        pending: list[NDArray[Any]] = []
        held = done = 0
        with self._open(dict.fromkeys(names, pa.from_numpy_dtype(self._dtype))) as reader:
            while (part := self._next(reader, done + held)) is not None:
                pending.append(part)
                held += len(part)
                while held >= rows:
                    block = np.concatenate(pending)
                    yield block[:rows]
                    done += rows
                    pending, held = [block[rows:]], held - rows
        if held:
            yield np.concatenate(pending)

    def _next(self, reader: Any, row: int) -> NDArray[Any] | None:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return None
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._path}, after row {row}: {error}") from error
        columns = [batch.column(n) for n in range(self._width)]
        if self._pick is not None:
            return self._numbers(columns[self._pick], row)
        return np.column_stack([self._numbers(column, row) for column in columns])

    def _numbers(self, column: pa.Array, row: int) -> NDArray[Any]:
        if column.null_count and self._dtype.kind != "f":
            raise DataError(f"{self._path}, after row {row}: a value is missing; wanted {self._dtype}")
        numbers: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return numbers.astype(self._dtype)
