"""How fast a disk is, measured once a day: two folders of one disk are planned by the same rates.

`~/.cache/penstock/disks.json` has them by host, device and mount point; where it cannot be read or written, every new
run folder is measured. `penstock doctor` measures anew.
"""

import json
import logging
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penstock.sampler.estimate import DiskRates, measure_disk
from penstock.storage.remote.config import default_stage_dir

logger = logging.getLogger(__name__)

_FRESH_S = 86400.0


def disk_rates(folder: Path, cache: Path | None = None) -> DiskRates:
    """The rates of the disk that a folder is on; DoesNotFit where measuring it has no room."""
    path, key = cache or _cache(), _key(folder)
    known = _read(path).get(key) if path is not None else None
    try:
        if known is not None and 0 <= time.time() - float(known["at"]) < _FRESH_S:
            return DiskRates(**known["rates"])
    except (KeyError, TypeError, ValueError) as error:
        logger.debug("%s is not as it was written (%s); measuring anew", path, error)
    return measure_anew(folder, path)


def measure_anew(folder: Path, cache: Path | None = None) -> DiskRates:
    """Measure, and remember it for all folders of the disk."""
    rates, path = measure_disk(folder), cache or _cache()
    if path is None:
        return rates
    value = {**_read(path), _key(folder): {"at": time.time(), "rates": asdict(rates)}}
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1))
        temporary.replace(path)
    except OSError as error:
        logger.debug("%s could not be written: %s", path, error)
    return rates


def _cache() -> Path | None:
    try:
        return default_stage_dir() / "disks.json"
    except ValueError:  # no home folder that can be written to
        return None


def _key(folder: Path) -> str:
    place = folder.resolve()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return f"{platform.node()}:{os.stat(folder).st_dev}:{place}"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
