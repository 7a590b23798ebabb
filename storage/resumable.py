"""Build a graph store in steps that survive `kill -9`.

While a store is being built, `out/.work/` holds `identity.json`, what it is built from, and `steps.json`, the steps
that are finished with the manifest entries of the files they wrote. A finished step is never redone; a step that was
cut starts over, and writes the same bytes. The store is published by its manifest, then `.work` goes. `source.json`
keeps the identity beside the store, so that a second call can tell "done already" from "something else is here".
Notes stand beside the identity in both and are no part of it: the next call may save work by them.
"""

import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphMeta, GraphStore, graph_manifest, open_graph
from penstock.storage.manifest import FileEntry, fsync_folder, is_published, read_json, write_json, write_manifest

logger = logging.getLogger(__name__)

SOURCE = "source.json"
_WORK, _IDENTITY, _STEPS, _NOTES = ".work", "identity.json", "steps.json", "notes"


def differing_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Name the keys, dotted, whose values differ between two JSON values; inputs in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        if prefix == ".inputs":
            return say_changes(old, new)
        keys = sorted(set(old) | set(new))
        return [name for key in keys for name in differing_keys(old.get(key), new.get(key), f"{prefix}.{key}")]
    return [] if old == new else [f"{prefix.lstrip('.')} ({old!r} there, {new!r} asked)"]


def say_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say how inputs differ, each a name and what is known of its content."""
    said = [f"{name} is new" for name in new if name not in old]
    said += [f"{name} is no longer there" for name in old if name not in new]
    for name in new:
        if name in old and old[name] != new[name]:
            before, now = old[name].get("bytes"), new[name].get("bytes")
            said.append(f"{name} has other content" + (f" ({now:,} bytes, {before:,} before)" if before != now else ""))
    return said


def recorded_notes(out: Path) -> dict[str, Any]:
    """The notes of the store, or of the unfinished build, that is at `out`; nothing where there is neither."""
    for path in (out / SOURCE, out / _WORK / _IDENTITY):
        with suppress(FormatError):
            notes: dict[str, Any] = read_json(path).get(_NOTES, {})
            return notes
    return {}


def _identity(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = read_json(path)
    return {key: item for key, item in value.items() if key != _NOTES}


class StoreBuild:
    """A graph store on its way. `work` is a folder for files that do not outlive the build. One process at a time."""

    def __init__(self, out: Path, source: dict[str, Any], steps: dict[str, Any]) -> None:
        self.out, self.work, self._source, self._steps = out, out / _WORK, source, steps

    def step(self, name: str, run: Callable[[], tuple[dict[str, Any], tuple[FileEntry, ...]]]) -> dict[str, Any]:
        """Run a step, or skip it where it is finished; returns the numbers that it reported (JSON)."""
        if name not in self._steps:
            numbers, entries = run()
            self._steps[name] = {"numbers": numbers, "files": [asdict(entry) for entry in entries]}
            fsync_folder(self.out)
            write_json(self.work / _STEPS, self._steps)
        else:
            logger.info("step %s of %s is finished already", name, self.out)
        numbers_kept: dict[str, Any] = self._steps[name]["numbers"]
        return numbers_kept

    def publish(self, meta: GraphMeta) -> GraphStore:
        """Write the manifest over all files of all steps, and drop the working folder."""
        entries = [entry for step in self._steps.values() for entry in step["files"]]
        files = tuple(FileEntry(**{**entry, "shape": tuple(entry["shape"])}) for entry in entries)
        write_json(self.out / SOURCE, self._source)
        write_manifest(self.out, graph_manifest(meta, files))
        shutil.rmtree(self.work)
        return open_graph(self.out)


def _finished(out: Path, identity: dict[str, Any]) -> GraphStore:
    there = _identity(out / SOURCE) if (out / SOURCE).is_file() else {}
    if there.get("version") != identity.get("version"):
        raise ValueError(
            f"{out} holds a graph that another release of Penstock built: it cannot be told whether from the same "
            "inputs; choose another folder, or delete this one to build it again"
        )
    if differing := differing_keys(there, identity):
        raise ValueError(
            f"{out} holds a graph built from something else: {'; '.join(differing[:5])}; "
            "choose another folder, or delete this one"
        )
    shutil.rmtree(out / _WORK, ignore_errors=True)  # left by a kill between publishing and cleaning
    logger.info("%s is complete already", out)
    return open_graph(out)


def _clear(out: Path, work: Path) -> None:
    """Drop an unfinished build. The working folder stays throughout: it marks `out` as ours."""
    work.mkdir(parents=True, exist_ok=True)
    (work / _IDENTITY).unlink(missing_ok=True)  # first: what follows may be cut, and must not look usable
    for pattern in ("*.npy", "*.parquet"):
        for path in out.glob(pattern):
            path.unlink()
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def begin_build(out: Path, identity: dict[str, Any], *, notes: dict[str, Any] | None = None) -> StoreBuild | GraphStore:
    """Start or continue building `out`, or return the store where it is complete.

    `identity` is JSON that says what the store is built from and how. ValueError names the keys that differ where `out`
    holds a store of another identity, or a folder that is not ours; an unfinished build of another identity is dropped.
    """
    if is_published(out):
        return _finished(out, identity)
    work = out / _WORK
    steps: dict[str, Any] = {}
    source = {**identity, **({_NOTES: notes} if notes else {})}
    try:
        if _identity(work / _IDENTITY) == identity:
            steps = read_json(work / _STEPS) if (work / _STEPS).is_file() else {}
            return StoreBuild(out, source, steps)
    except FormatError:
        pass  # no working folder, or one that was cut before it was usable
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose an empty or new folder")
    if out.is_dir() and any(out.iterdir()) and not work.is_dir():
        raise ValueError(f"{out} is not empty and holds no graph of ours; choose an empty or new folder")
    _clear(out, work)
    write_json(work / _IDENTITY, source)
    return StoreBuild(out, source, steps)
