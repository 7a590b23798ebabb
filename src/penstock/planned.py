"""What an earlier plan left in a run folder; light, since verbs that compute nothing read it."""

from pathlib import Path
from typing import Any

from penstock.storage.manifest import read_json


def planned_memory(folder: Path) -> dict[str, Any] | None:
    """What was predicted for the run in the folder, where there is one that was planned."""
    for path in (folder / "train" / "plan.json", folder / "plan.json"):
        if path.is_file():
            found: dict[str, Any] | None = read_json(path).get("memory")
            return found
    return None
