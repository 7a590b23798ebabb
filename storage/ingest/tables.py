"""One table in one or more Parquet files, read in batches, without loading row groups whole.

Files may order columns differently, use other types of numbers, or type null where a part has no value. Columns that
the folders give (see `listing`) come as integers where all values are, else as strings.
"""

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from penstock.storage.errors import DataError
from penstock.storage.ingest.arrow import is_list, is_text, list_widths, plain, plain_type
from penstock.storage.ingest.inputs import InputFile
from penstock.storage.ingest.listing import Part, list_parts

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
_SCAN_ROWS = 256  # of lists, to find the first that has values


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as Parquet ({error}); write it again") from error


class Table:
    """One table. `types` maps its columns to what `plain` makes of them."""

    def __init__(self, kind: str, paths: Path | list[Path]) -> None:
        self.kind = kind
        self.parts = list_parts(kind, paths)
        self._rows: list[int] = []
        self.types: dict[str, pa.DataType] = {}
        self._physical = set[str]()
        for n, part in enumerate(self.parts):
            with _readable(part.path):
                file = pq.ParquetFile(part.path)
                self._rows.append(file.metadata.num_rows)
                schema = file.schema_arrow
            self._add(part.path, schema, first=n == 0)
        self._key_types = self._find_key_types()
        self.types |= self._key_types
        self.num_rows = sum(self._rows)

    def _add(self, path: Path, schema: pa.Schema, first: bool) -> None:
        names = set(schema.names)
        if len(names) < len(schema.names):
            twice = next(name for name in schema.names if schema.names.count(name) > 1)
            raise DataError(f"{path} has two columns {twice!r}; rename one")
        if first:
            self._physical = names
        if names != self._physical:
            raise DataError(f"{path} has columns {schema.names}, {self.parts[0].path} has {sorted(self._physical)}")
        for field in schema:
            kind, before = plain_type(field.type), self.types.get(field.name)
            if before is None or pt.is_null(before):
                self.types[field.name] = kind
            elif not pt.is_null(kind) and _family(kind) != _family(before):
                raise DataError(
                    f"{path}: column {field.name!r} is of type {kind} here and {before} in a file before; give one type"
                )

    def _find_key_types(self) -> dict[str, pa.DataType]:
        found: dict[str, pa.DataType] = {}
        for key in self.parts[0].keys:
            if key not in self._physical:  # else the column in the files says it
                values = [value for part in self.parts if (value := part.keys[key]) is not None]
                whole = bool(values) and all(_is_whole(value) for value in values)
                found[key] = pa.int64() if whole else pa.string()
        return found

    @property
    def place(self) -> str:
        """Where the table is, for messages: its first file."""
        return str(self.parts[0].path)

    def has(self, name: str, *, wanted: bool, option: str = "", remedy: str = "") -> bool:
        """Whether the column is there; DataError, naming the nearest and the `option` that names another, where it is
        `wanted` and is not."""
        if name in self.types:
            return True
        near = difflib.get_close_matches(name, list(self.types), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        if wanted:
            use = "; ".join(part for part in (f"name yours with --set {option}=..." if option else "", remedy) if part)
            raise DataError(
                f"{self.place}: the {self.kind} table has no column {name!r}; {hint}it has {[*self.types]}"
                f"{'; ' if use else ''}{use}"
            )
        if near:
            logger.warning("the %s table has no column %r and goes without; %s", self.kind, name, hint)
        return False

    def unused(self, used: set[str]) -> list[str]:
        """Columns that are not among `used`."""
        return [name for name in self.types if name not in used]

    def batches(self, rows: int, columns: list[str]) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        """Path, first row in that file, and up to `rows` rows of these columns."""
        for part, num_rows in zip(self.parts, self._rows, strict=True):
            at = 0
            for batch in self._read(part, rows, num_rows, [name for name in columns if name not in self._key_types]):
                for name in columns:
                    if name in self._key_types:
                        batch = batch.append_column(name, self._constant(part, name, batch.num_rows))
                yield str(part.path), at, batch
                at += batch.num_rows

    def _read(self, part: Part, rows: int, num_rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        if not columns:
            for lo in range(0, num_rows, rows):
                count = min(rows, num_rows - lo)
                yield pa.RecordBatch.from_arrays([pa.nulls(count)], names=[""])
            return
        with _readable(part.path):
            # without pre-buffering, memory is a few pages per column and not a row group
            file = pq.ParquetFile(part.path, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            batches = file.iter_batches(rows, columns=columns, use_threads=False)
        while True:
            with _readable(part.path):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _constant(self, part: Part, name: str, count: int) -> pa.Array:
        value, kind = part.keys[name], self._key_types[name]
        scalar: str | int | None = int(value) if value is not None and kind == pa.int64() else value
        return pa.repeat(pa.scalar(scalar, kind), count)

    def list_width(self, name: str) -> int:
        """Values in the first list that has any, 0 where none has."""
        kind = self.types[name]
        if pt.is_fixed_size_list(kind):
            return int(kind.list_size)
        for rows in (1, _SCAN_ROWS):
            for _, _, batch in self.batches(rows, [name]):
                column = plain(batch.column(name))
                width = int(list_widths(column).max(initial=0)) if is_list(column.type) else 0
                if width > 0:
                    return int(next(width for width in list_widths(column).tolist() if width > 0))
                if rows == 1:
                    break
        return 0

    def inputs(self) -> list[InputFile]:
        """The files, by their place in the order and the values of their folders: names are the writer's whim."""
        names = [f"the {self.kind} table"]
        if len(self.parts) > 1:
            names = [f"file {n + 1} of the {self.kind} table" for n in range(len(self.parts))]
        return [
            InputFile(role=name, path=part.path, facts={f"key {key}": str(value) for key, value in part.keys.items()})
            for name, part in zip(names, self.parts, strict=True)
        ]


def _is_whole(value: str) -> bool:
    return value.removeprefix("-").isdecimal() and str(int(value)) == value and -(2**63) <= int(value) < 2**63


def _family(kind: pa.DataType) -> str:
    return "lists" if is_list(kind) else "strings" if is_text(kind) else "others"
