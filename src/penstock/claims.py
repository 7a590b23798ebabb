"""Folders of derived data, each of which says what it was derived from, so that nothing is taken for something else."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from penstock.storage.manifest import read_json, write_json

logger = logging.getLogger(__name__)

CLAIM = "made-of.json"


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
        _clear(folder, kept if is_same else ())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def _clear(folder: Path, kept: tuple[str, ...]) -> None:
    (folder / CLAIM).unlink(missing_ok=True)  # first: what is half deleted must not look usable
    found = (
        [path for path in folder.iterdir() if path.name not in kept and not path.name.startswith(".lock")]
        if (folder.is_dir())
        else []
    )
    if found:
        logger.info("%s was made of something else; clearing %s", folder, ", ".join(sorted(p.name for p in found)))
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
