"""Checkpoints: safetensors for tensors, JSON for the rest, nothing pickled.

A checkpoint is a folder `step-000000123` with `model.safetensors`, `optimizer.safetensors`, `best.safetensors` (the
weights of the best epoch so far, where there is one) and `state.json`, which names the size and xxh3-64 of the others.
It is written under a temporary name, synced and renamed, so a folder of that name is complete unless a disk failed.
"""

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor, nn

from penstock.storage.errors import FormatError
from penstock.storage.manifest import checksum_file, fsync_folder, read_json, write_atomic, write_json

logger = logging.getLogger(__name__)

FORMAT = "penstock/checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{9,})")
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose checksums hold. `tensors` by file: `model`, `optimizer` and perhaps `best`."""

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise tensors: equal tensors give equal bytes. Tied tensors are written once per name."""
    return safetensors.torch.save({name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()})


def model_checksum(model: nn.Module) -> str:
    """xxh3-64 of the bytes that `model.safetensors` would have, in hex."""
    return str(xxhash.xxh3_64_hexdigest(pack_tensors(model.state_dict())))


def write_checkpoint(
    folder: Path, step: int, state: dict[str, Any], tensors: Mapping[str, Mapping[str, Tensor]], *, keep: int
) -> Path:
    """Write `folder/step-...` and delete all but the `keep` newest.

    Raises DoesNotFit where the disk is full; the earlier checkpoints are then as they were.
    """
    final = folder / f"step-{step:09d}"
    temporary = folder / f".{final.name}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        files = {}
        for name, named in tensors.items():
            data = pack_tensors(named)
            write_atomic(temporary / f"{name}.safetensors", data)
            files[name] = {"bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}
        value = {"format": FORMAT, "version": VERSION, "step": step, "state": state, "files": files}
        write_json(temporary / "state.json", value)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    replaced = folder / f".{final.name}.old"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # same step, later state; kept until the new one has its name
        final.rename(replaced)
    temporary.rename(final)
    fsync_folder(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in list_checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of all checkpoints, the newest first; nothing is read."""
    found = {int(match[1]): path for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; FormatError where a size or checksum is not what its `state.json` says."""
    value = read_json(path / "state.json", f"delete {path}", keys=("format", "version"))
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise FormatError(f"{path}/state.json is no {FORMAT} of version {VERSION}; use the release that wrote it")
    require_step(path, value["step"])
    tensors = {}
    for name, entry in value["files"].items():
        file = path / f"{name}.safetensors"
        if not file.is_file() or file.stat().st_size != entry["bytes"] or checksum_file(file) != entry["xxh3"]:
            raise FormatError(f"{file} is missing or not what state.json says; delete {path}")
        tensors[name] = read_tensors(file)
    return Checkpoint(path=path, step=value["step"], state=value["state"], tensors=tensors)


def require_step(path: Path, step: int) -> None:
    """FormatError where the folder of a checkpoint is named after another step than its state says."""
    if (match := _NAME.fullmatch(path.name)) and int(match[1]) != step:
        raise FormatError(f"{path}/state.json is of step {step}; delete {path}")


def read_latest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is intact; see `read_intact`."""
    for replaced in folder.glob(".step-*.old"):  # killed between the two renames of `write_checkpoint`
        if not (final := folder / replaced.name[1 : -len(".old")]).exists():
            replaced.rename(final)
    return read_intact(folder, read_checkpoint)


def read_intact(folder: Path, read: Callable[[Path], _Found]) -> _Found | None:
    """What `read` makes of the newest checkpoint that is intact, None where there is none at all.

    A damaged one is skipped with a warning; FormatError where all are damaged, because starting over without a word
    would throw work away.
    """
    damaged: FormatError | None = None
    for path in list_checkpoints(folder):
        try:
            return read(path)
        except FormatError as error:
            logger.warning("checkpoint %s is damaged, using the one before it: %s", path, error)
            damaged = error
    if damaged:
        raise FormatError(f"no checkpoint in {folder} is intact ({damaged}); delete {folder} to train from the start")
    return None


def delete_checkpoints(folder: Path) -> None:
    """Delete every checkpoint, to train from the start."""
    for path in [*list_checkpoints(folder), *folder.glob(".step-*")]:
        shutil.rmtree(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file; FormatError where it is none."""
    try:
        return safetensors.torch.load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} cannot be read as safetensors ({error})") from error
