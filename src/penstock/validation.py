"""Read every file of a run folder and compare it with what is known of it; nothing is changed.

Training finds what is damaged when it reads it; this finds all of it at once, also what no step will read again.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from penstock.engine import checkpoint
from penstock.engine.chunked import checkpoints as chunked_checkpoints
from penstock.engine.modelfile import check_model_files
from penstock.report import read_config
from penstock.storage.blocks import sums_name
from penstock.storage.chunks import validate_chunks
from penstock.storage.directio import DirectFile, aligned_buffer, page_up
from penstock.storage.errors import FormatError
from penstock.storage.manifest import checksum_file, is_published, read_json, read_manifest
from penstock.storage.npyfile import read_npy
from penstock.storage.pack import FORMAT as PACKS
from penstock.storage.pack import VERSIONS as PACK_VERSIONS
from penstock.storage.pack import open_packset, page_sums, read_pack_index
from penstock.storage.trace import WindowIndex, open_trace, read_window_index, window_name

_SHOWN = 8  # damaged files that a message names
_UNCHECKED = (".png", ".lock", ".tmp")  # pictures, and what has no content to speak of
Check = tuple[Callable[[], Any], list[Path]]  # what to call, and the files that it reads


def _again(index: Path) -> str:
    return f"delete {index} and run the command that made it again"


def validate_trace_window(folder: Path, index: WindowIndex) -> None:
    """Compare a window of a trace with its index; FormatError where it differs."""
    path = folder / window_name(index.window, "trace")
    if (found := checksum_file(path)) != index.xxh3:
        again = _again(folder / window_name(index.window, "json"))
        raise FormatError(f"{path} has checksum {found}, its index says {index.xxh3}; {again}")


def validate_pack_window(folder: Path, window: int) -> None:
    """Compare all files of a window of packs with its index; FormatError names the first part that differs."""
    index = read_pack_index(folder, window)
    again = _again(folder / window_name(window, "json"))
    for suffix, xxh3 in (("residents.npy", index.residents_xxh3), ("wrap.npy", index.wrap_xxh3)):
        if xxh3:
            read_npy(folder / window_name(window, suffix), xxh3, again)
    buffer = aligned_buffer(max(*index.bytes, page_up(1)))
    with DirectFile(folder / window_name(window, "pack"), "read") as file:
        if index.shared_bytes:
            pages = read_npy(folder / window_name(window, "pages.npy"), index.pages_xxh3, again)
            for offset in range(0, index.shared_bytes, len(buffer)):
                num_bytes = min(len(buffer), index.shared_bytes - offset)
                file.read_into(buffer, offset, num_bytes)
                first = offset // page_up(1)
                found = page_sums(buffer[:num_bytes].data)
                if not np.array_equal(found, pages[first : first + len(found)]):
                    raise FormatError(f"{file.path}: the shared segment differs from its checksums; {again}")
        for item, (offset, num_bytes) in enumerate(zip(index.offsets, index.bytes, strict=True)):
            file.read_into(buffer, offset, num_bytes)
            if xxhash.xxh3_64_hexdigest(buffer[:num_bytes].data) != index.xxh3[item]:
                raise FormatError(f"{file.path}: item {index.first_item + item} differs from its checksum; {again}")


def _validate_packs(folder: Path) -> None:
    meta = open_packset(folder)
    if is_published(folder) and read_manifest(folder, PACKS, PACK_VERSIONS).meta != asdict(meta):
        raise FormatError(f"{folder}: packset.json and manifest.json are of two pack sets; delete the folder")
    there = {int(path.stem.split("-")[1]) for path in folder.glob("window-*.json")}
    for window in sorted(there | (set(range(meta.num_windows)) if is_published(folder) else set())):
        validate_pack_window(folder, window)


def _validate_trace(folder: Path) -> None:
    trace = open_trace(folder)
    for window in range(trace.meta.num_windows):
        validate_trace_window(folder, read_window_index(folder, window))


def _validate_checkpoint(folder: Path) -> None:
    value = read_json(folder / "state.json", f"delete {folder}")
    chunked = value.get("format") == chunked_checkpoints.FORMAT
    (chunked_checkpoints.read_checkpoint if chunked else checkpoint.read_checkpoint)(folder)


def _validate_table(marker: Path) -> None:
    """A table of an exact pass, and the checksums of its blocks, which those of earlier releases do not have."""
    found, path = read_json(marker, keys=("xxh3",)), marker.with_suffix(".npy")
    again = _again(marker)
    parts = {path.name: found["xxh3"]}
    if "sums" in found:
        parts[sums_name(path.name)] = found["sums"]
    for name, wanted in parts.items():
        there = (path.parent / name).is_file()
        if not there or checksum_file(path.parent / name) != wanted:
            raise FormatError(f"{path.parent / name} is not what {marker.name} says; {again}")


def _folder_check(folder: Path) -> Callable[[Path], Any] | None:
    """What checks a whole folder, if it is one of ours."""
    if (folder / "packset.json").is_file() or any(folder.glob("window-*.pack")):
        return _validate_packs
    if (folder / "trace.json").is_file():
        return _validate_trace
    if (folder / "chunks.json").is_file():
        return validate_chunks
    if folder.parent.name == "checkpoints" and folder.name.startswith("step-"):
        return _validate_checkpoint
    return check_model_files if (folder / "model.json").is_file() else None


def _checks(folder: Path) -> Iterator[Check]:
    """All checks below a folder."""
    check = _folder_check(folder)
    if check is not None:
        yield partial(check, folder), [path for path in folder.rglob("*") if path.is_file()]
        return
    paths = sorted(folder.iterdir())
    for path in paths:
        if path.is_dir():
            yield from _checks(path)
        elif path.suffix == ".json":
            table = path.with_suffix(".npy")
            beside = [other for other in (table, table.with_name(sums_name(table.name))) if other.is_file()]
            is_table = path.stem.startswith("layer-")
            yield partial(_validate_table if is_table else read_json, path), [path, *beside]
        elif path.suffix == ".yaml":
            yield partial(read_config, path), [path]


def validate_run(path: Path) -> dict[str, Any]:
    """How many files were compared, and which have nothing to compare with; FormatError names those that differ."""
    damaged, seen = [], set[Path]()
    for check, files in _checks(path):
        seen.update(files)
        try:
            check()
        except (FormatError, ValueError, KeyError, OSError) as error:
            damaged.append(str(error) or repr(error))
    if damaged:
        more = f"\n... and {len(damaged) - _SHOWN} more" if len(damaged) > _SHOWN else ""
        raise FormatError(
            f"{path} has {len(damaged)} parts that are damaged, or of another release:\n"
            + "\n".join(damaged[:_SHOWN])
            + more
        )
    everything = {file for file in path.rglob("*") if file.is_file()}
    rest = sorted(str(file.relative_to(path)) for file in everything - seen if not file.name.endswith(_UNCHECKED))
    return {"files_checked": len(seen), "files_without_checksum": rest}
