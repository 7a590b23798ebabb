"""Folders of derived data, each of which says what it was derived from, so that nothing is taken for something else."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.storage.manifest import read_json, write_json

logger = logging.getLogger(__name__)

CLAIM = "made-of.json"


def made_of(folder: Path) -> dict[str, Any]:
    """What a folder says that it was derived from; empty where it says nothing."""
    path = folder / CLAIM
    found: dict[str, Any] = (read_json(path) if path.is_file() else {}).get("made_of", {})
    return found


def claim(
    folder: Path,
    made_of: dict[str, Any],
    under: dict[str, Any] | None = None,
    *,
    kept: tuple[str, ...] = (),
    still_good: Callable[[], bool] = lambda: False,
) -> None:
    """Clear a folder of what was not derived from `made_of`, both JSON.

    What was made `under` other terms, as budgets are, is cleared too, but for the entries `kept`, unless it is
    `still_good`.
    """
    wanted = {"made_of": made_of, "under": under or {}}
    path = folder / CLAIM
    there = read_json(path) if path.is_file() else {}
    if there == wanted:
        return
    is_same = there.get("made_of") == made_of
    if not (is_same and still_good()):
        before = there.get("made_of") or {}
        differing = sorted(key for key in made_of if before.get(key) != made_of[key]) if before else ["what is unknown"]
        _clear(folder, kept if is_same else (), "another plan" if is_same else ", ".join(differing))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _clear(folder: Path, kept: tuple[str, ...], why: str) -> None:
    (folder / CLAIM).unlink(missing_ok=True)  # first: what is half deleted must not look usable
    found = (
        [path for path in folder.iterdir() if path.name not in kept and not path.name.startswith(".lock")]
        if (folder.is_dir())
        else []
    )
    if found:
        names = ", ".join(sorted(path.name for path in found))
        logger.info("%s was made of something else (%s); clearing %s", folder, why, names)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
