"""Checkpoints of full-graph training: every rank writes its shard, then the driver publishes them all at once.

A checkpoint is a folder `step-000000012` (12 epochs done) with the shards (see `shards`) and `state.json`, written
last, which names size and checksum of every file. It is made under a temporary name, so a folder of that name is
complete.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.engine.checkpoint import list_checkpoints, read_intact, require_step
from penstock.storage.errors import FormatError
from penstock.storage.manifest import checksum_file, fsync_folder, read_json, write_json

FORMAT = "penstock/chunked-checkpoint"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkedCheckpoint:
    """A complete checkpoint whose checksums hold. `state` is the driver's."""

    path: Path
    epoch: int
    state: dict[str, Any]


def begin_checkpoint(folder: Path, epoch: int) -> Path:
    """Make the temporary folder that ranks write into."""
    temporary = folder / f".step-{epoch:09d}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    delete_unfinished(folder)
    temporary.mkdir()
    return temporary


def delete_unfinished(folder: Path) -> None:
    """Delete what was begun and not published; no rank may still write to it."""
    for left in folder.glob(".step-*.tmp"):
        shutil.rmtree(left)


def publish_checkpoint(
    folder: Path, epoch: int, state: dict[str, Any], files: dict[str, dict[str, Any]], *, keep: int
) -> Path:
    """Name and sync what the ranks wrote; delete all but the `keep` newest."""
    temporary, final = folder / f".step-{epoch:09d}.tmp", folder / f"step-{epoch:09d}"
    write_json(
        temporary / "state.json", {"format": FORMAT, "version": VERSION, "epoch": epoch, "state": state, "files": files}
    )
    fsync_folder(temporary)
    if final.exists():  # a killed run had come this far and was resumed from before
        shutil.rmtree(final)
    temporary.rename(final)
    fsync_folder(folder)
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return final


def read_checkpoint(path: Path) -> ChunkedCheckpoint:
    """Check one checkpoint; FormatError where a file is missing or differs."""
    value = read_json(path / "state.json", f"delete {path}", keys=("format", "version"))
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise FormatError(f"{path}/state.json is no {FORMAT} of version {VERSION}; use the release that wrote it")
    require_step(path, value["epoch"])
    for name, entry in value["files"].items():
        file = path / name
        if "/" in name or not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise FormatError(f"{file} is missing or has another size than state.json says; delete {path}")
        if checksum_file(file) != entry["xxh3"]:
            raise FormatError(f"{file} is not what state.json says; delete {path}")
    return ChunkedCheckpoint(path=path, epoch=value["epoch"], state=value["state"])


def read_latest(folder: Path) -> ChunkedCheckpoint | None:
    """Read the newest checkpoint that is intact; see `engine.checkpoint.read_intact`."""
    return read_intact(folder, read_checkpoint)
