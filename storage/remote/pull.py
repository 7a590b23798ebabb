"""Bring a run back from its remote copy.

Of the checkpoints the newest that is complete and whose checksums hold comes back. It replaces those that are here:
`metrics.jsonl` comes with it, and where they continued on different hosts its lines are not those that ours count on.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from penstock.storage.errors import FormatError
from penstock.storage.manifest import checksum_file, fsync_folder
from penstock.storage.remote.files import RemoteFolder, open_remote
from penstock.storage.remote.mirror import (
    CHECKPOINTS,
    FIRST_FILES,
    LAST_FILES,
    MODEL,
    RESULT,
    STATE,
    RemoteCheckpoint,
    list_remote_checkpoints,
    local_checkpoints,
)

logger = logging.getLogger(__name__)

_PULLED = ".pulled"


def _is_finished(result: bytes | None) -> bool:
    try:
        return result is not None and json.loads(result).get("status") == "ok"
    except (ValueError, AttributeError):
        return False


def complete_checkpoints(remote: RemoteFolder) -> list[RemoteCheckpoint]:
    """Remote checkpoints that have their `state.json`, the newest first."""
    found = list_remote_checkpoints(remote)
    return [each for each in found if remote.size(f"{CHECKPOINTS}/{each.name}/{STATE}")]


def pull(uri: str, folder: Path, *, remote: RemoteFolder | None = None) -> bool:
    """Bring back the run at `uri` where `folder` has none or an older one; whether something was brought.

    FormatError where there are complete remote checkpoints and all are damaged. What is here stays until the newest
    checkpoint is here too.
    """
    remote = remote or open_remote(uri)
    if remote.size("config.yaml") is None:
        return False
    result, checkpoints = remote.read_if_there(RESULT), complete_checkpoints(remote)
    local = folder / RESULT
    local_rank = (
        _is_finished(local.read_bytes() if local.is_file() else None),
        max(local_checkpoints(folder), default=-1),
    )
    there = (_is_finished(result), checkpoints[0].step if checkpoints else -1)
    if (folder / "config.yaml").is_file() and there <= local_rank:
        return False
    logger.warning("bringing the run back from %s, step %d", remote.uri, there[1])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / _PULLED, ignore_errors=True)
    fresh = [each for each in checkpoints if each.step > local_rank[1]]
    pulled = _pull_checkpoint(remote, fresh, folder / _PULLED)
    if pulled is not None:
        for path in local_checkpoints(folder).values():
            shutil.rmtree(path)
    for name in FIRST_FILES:
        _fetch(remote, name, folder / name)
    if pulled is not None:
        final = folder / CHECKPOINTS / pulled.name
        final.parent.mkdir(exist_ok=True)
        pulled.rename(final)
        fsync_folder(final.parent)
        shutil.rmtree(folder / _PULLED)
    fetch_results(remote, folder)
    return True


def fetch_results(remote: RemoteFolder, folder: Path) -> None:
    """Copy model, plots and result of a run, the result last."""
    data = remote.read_if_there(f"{MODEL}/model.json")
    local = folder / MODEL / "model.json"
    if data is not None and not (local.is_file() and local.read_bytes() == data):
        local.unlink(missing_ok=True)
        names = [name for name in remote.names(MODEL) if name[0] != "."]
        for name in sorted(names, key=lambda name: name == "model.json"):
            _fetch(remote, f"{MODEL}/{name}", folder / MODEL / name)
    for name in (*LAST_FILES, RESULT):
        _fetch(remote, name, folder / name)


def fetch(uri: str, folder: Path) -> list[str]:
    """Copy what is needed to use a trained run: all but its checkpoints, whose names are returned."""
    remote = open_remote(uri)
    for name in FIRST_FILES:
        _fetch(remote, name, folder / name)
    fetch_results(remote, folder)
    return [each.name for each in complete_checkpoints(remote)]


def _fetch(remote: RemoteFolder, name: str, path: Path) -> None:
    try:
        remote.download(name, path)
    except FileNotFoundError:
        path.unlink(missing_ok=True)


def _pull_checkpoint(remote: RemoteFolder, checkpoints: list[RemoteCheckpoint], folder: Path) -> Path | None:
    """Copy the newest that is intact into `folder`; None where there are none."""
    damaged: FormatError | None = None
    for checkpoint in checkpoints:
        source, path = f"{CHECKPOINTS}/{checkpoint.name}", folder / f"step-{checkpoint.step:09d}"
        try:
            for name in remote.names(source):
                if name[0] != ".":
                    remote.download(f"{source}/{name}", path / name)
            _check_checkpoint(path, remote.uri_of(source))
            return path
        except (FormatError, FileNotFoundError) as error:
            damaged = error if isinstance(error, FormatError) else FormatError(f"{error} has gone")
            logger.warning("%s is damaged, using the one before it: %s", remote.uri_of(source), error)
            shutil.rmtree(path, ignore_errors=True)
    if damaged:
        raise FormatError(
            f"no checkpoint at {remote.uri} is intact ({damaged}); delete {CHECKPOINTS} there to train from the start"
        )
    return None


def _check_checkpoint(path: Path, uri: str) -> None:
    """Compare files with `state.json`, which names them with or without their ending."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / STATE).read_bytes())["files"]
        for name, entry in files.items():
            if "/" in name or name[0] == ".":
                raise FormatError(f"{uri}/{STATE} names {name!r}, which is no file of a checkpoint")
            file = path / name if (path / name).is_file() else path / f"{name}.safetensors"
            if not file.is_file() or file.stat().st_size != entry["bytes"] or checksum_file(file) != entry["xxh3"]:
                raise FormatError(f"{uri}/{file.name} is missing or not what {STATE} says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{uri}/{STATE} is malformed ({error})") from error
