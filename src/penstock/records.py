"""Read `metrics.jsonl`, for pictures and for people."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; empty where there is none, and without lines that are damaged: nothing depends on it."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            record = json.loads(line) if line else None
            if record is not None and not isinstance(record, dict):
                raise ValueError(f"it holds {type(record).__name__}, not an object")
            found += [] if record is None else [record]
        except ValueError as error:
            logger.warning("%s, line %d is damaged and left out: %s", path, number + 1, error)
    return found


def epoch_records(metrics: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says of whole epochs, one entry each: the last evaluation may have a line of its own."""
    found: dict[int, dict[str, Any]] = {}
    for line in read_metrics(metrics):
        epoch = line.get("epoch")
        if isinstance(epoch, int) and ("train_loss" in line or epoch in found):
            found[epoch] = found.get(epoch, {}) | line
    return [value for _, value in sorted(found.items())]
