"""Which files make up a table: one file, a list, or a folder as Spark, Dask and pyarrow write it.

Under a folder, entries that begin with a dot or an underscore are no data (`_SUCCESS`, `_temporary`, `.crc`), as for
Spark. A folder `key=value` gives its files a column of that name. Table formats that keep files which are no longer
part of the table (Delta, Iceberg, Hudi) are refused unless their log shows that every file is.
"""

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from penstock.storage.errors import DataError
from penstock.storage.manifest import near_miss

logger = logging.getLogger(__name__)

_SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
_NULL = "__HIVE_DEFAULT_PARTITION__"
_EXPORT = "write its current rows as plain Parquet, for example df.write.parquet(...), and ingest that"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A file of a table, with the values that the folders above it give, None for null."""

    path: Path
    keys: dict[str, str | None]


def list_parts(kind: str, paths: Path | str | list[Path]) -> list[Part]:
    """Find the files of a table, in the order of their paths; DataError where there are none."""
    found: list[Part] = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        path = Path(path)
        if not path.exists():
            raise DataError(f"{path}, the {kind} table, does not exist{near_miss(path)}")
        found += _folder_parts(kind, path) if path.is_dir() else [Part(path=path, keys={})]
    if not found:
        raise DataError(f"{paths} holds no .parquet file for the {kind} table")
    names = {tuple(part.keys) for part in found}
    if len(names) > 1:
        raise DataError(f"{paths}: files of the {kind} table are partitioned differently, by {sorted(names)}; use one")
    return found


def _folder_parts(kind: str, folder: Path) -> list[Part]:
    ignored: list[str] = []
    parts: list[Part] = []
    for path in sorted(_files(folder, set())):
        if path.suffix.lower() in _SUFFIXES or _is_parquet(path):
            parts.append(Part(path=path, keys=_partition(path.relative_to(folder))))
        else:
            ignored.append(str(path.relative_to(folder)))
    if ignored and parts:
        logger.warning("%s: files that are no Parquet are not read: %s", folder, ignored[:20])
    if (folder / "_temporary").is_dir():
        logger.warning("%s has _temporary: a job that writes the %s table has not finished, or failed", folder, kind)
    _refuse_stale(kind, folder, [part.path for part in parts])
    return parts


def _hidden(name: str) -> bool:
    return name.startswith(".") or (name.startswith("_") and "=" not in name) or name.endswith("._COPYING_")


def _files(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    """Visible files, links followed; a link to a folder above is not followed again."""
    stat = folder.stat()
    above = above | {(stat.st_dev, stat.st_ino)}
    for entry in os.scandir(folder):
        if _hidden(entry.name):
            continue
        path = Path(entry.path)
        if not path.is_dir():
            yield path
        elif (path.stat().st_dev, path.stat().st_ino) not in above:
            yield from _files(path, above)


def _is_parquet(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def _partition(relative: Path) -> dict[str, str | None]:
    keys: dict[str, str | None] = {}
    for folder in relative.parts[:-1]:
        key, equals, value = folder.partition("=")
        if equals and key:
            keys[unquote(key)] = None if value == _NULL else unquote(value)
    return keys


def _refuse_stale(kind: str, folder: Path, files: list[Path]) -> None:
    if (folder / "_delta_log").is_dir():
        _check_delta(kind, folder, files)
    for marker, format in ((".hoodie", "a Hudi"), ("_spark_metadata", "a streaming sink's")):
        if (folder / marker).is_dir():
            raise DataError(f"{folder} is {format} table: its folder keeps files that are no longer in it; {_EXPORT}")
    if any((folder / "metadata").glob("*.metadata.json")):
        raise DataError(f"{folder} is an Iceberg table: its folder keeps files that are no longer in it; {_EXPORT}")


def _check_delta(kind: str, folder: Path, files: list[Path]) -> None:
    """Accept a Delta table whose files are just those of its newest version."""
    commits = sorted(path for path in (folder / "_delta_log").glob("*.json") if path.stem.isdigit())
    if [int(path.stem) for path in commits] != list(range(len(commits))) or not commits:
        raise DataError(f"{folder} is a Delta table whose log does not begin at version 0; {_EXPORT}")
    active: set[str] = set()
    for commit in commits:
        for line in commit.read_text().splitlines():
            action = json.loads(line) if line.strip() else {}
            settings = action.get("metaData", {}).get("configuration") or {}
            if settings.get("delta.columnMapping.mode", "none") != "none":
                raise DataError(f"{folder} is a Delta table with column mapping; {_EXPORT}")
            if "remove" in action:
                active.discard(unquote(action["remove"]["path"]))
            if "add" in action:
                active.add(unquote(action["add"]["path"]))
                if action["add"].get("deletionVector"):
                    raise DataError(f"{folder} is a Delta table with deletion vectors: rows were deleted; {_EXPORT}")
    there = {str(path.relative_to(folder)) for path in files}
    if stale := sorted(there - active):
        raise DataError(
            f"{folder} is a Delta table, and {len(stale)} of {len(there)} files of the {kind} table are no longer in "
            f"its newest version, {stale[0]} for one; {_EXPORT}, or remove them with VACUUM"
        )
    if lost := sorted(active - there):
        raise DataError(f"{folder} is a Delta table, and its file {lost[0]} is missing; restore it")
