"""What a run leaves behind: `result.json`, the page made of it, the resolved configuration."""

import logging
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from penstock.config import RunConfig
from penstock.exit_codes import exit_code
from penstock.locations import publish_file
from penstock.machine import hardware, versions
from penstock.records import epoch_records
from penstock.report_page import PAGE, write_page
from penstock.storage import cgroup
from penstock.storage.budget import children_peak_rss_bytes, peak_rss_bytes
from penstock.storage.errors import DataError, DoesNotFit, FormatError
from penstock.storage.manifest import read_text, write_atomic, write_json, write_text
from penstock.storage.redaction import redact, refuse_secrets
from penstock.storage.remote.config import is_uri
from penstock.storage.remote.files import RemoteError

logger = logging.getLogger(__name__)

RESULT_SCHEMA = 1


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, if it does."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _describe(error: BaseException) -> dict[str, Any]:
    return {"type": type(error).__name__, "message": str(error), "exit_code": exit_code(error)}


def write_result(
    path: Path,
    *,
    status: str,
    config: RunConfig | None,
    metrics: dict[str, Any],
    copy: Path | str | None = None,
    error: BaseException | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Write `result.json` and, where asked, a copy, without secrets; both atomically, making parent folders.

    Of a run that is done, `report.html` comes first: where there is such a result, everything is there.
    """
    value: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        "status": status,
        "error": None if error is None else _describe(error),
        "metrics": metrics,
        "epochs": epoch_records(path.parent / "metrics.jsonl"),
        "artefacts": {},
        "timings": {},
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "peak_rss_bytes": peak_rss_bytes(),
        "children_peak_rss_bytes": children_peak_rss_bytes(),
        "cgroup_peak_bytes": cgroup.memory_peak(),
        "versions": versions(),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "config": None if config is None else config.model_dump(mode="json"),
        **sections,
    }
    value = redact(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    if status == "ok" and config is not None:
        write_page(path.parent, value, config)
        value["artefacts"][PAGE] = str((path.parent / PAGE).resolve())
    write_json(path, value)
    if copy is not None:
        copy_result(path, copy)
    return value


def copy_result(path: Path, copy: Path | str) -> None:
    """Copy a `result.json` to a path or URI. That this fails is a warning: it must not make a failure of a success."""
    try:
        if is_uri(copy):
            publish_file(path, str(copy))
            return
        Path(copy).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(copy), path.read_bytes())
    except (OSError, DoesNotFit, DataError, RemoteError) as error:
        logger.warning("%s could not be copied to %s: %s", path, copy, error)


def write_config(path: Path, config: RunConfig, graph: str) -> None:
    """Write the resolved configuration as YAML that `-c` accepts, above it the graph's fingerprint; ValueError where it
    holds a secret."""
    value = config.model_dump(mode="json")
    refuse_secrets(value)
    write_text(path, f"# graph: {graph}\n{yaml.safe_dump(value, sort_keys=False)}")


def read_config(path: Path) -> dict[str, Any]:
    """Read what `write_config` has written, or a person; FormatError where it is damaged."""
    remedy = "delete it and run the same command again, which writes it anew"
    try:
        value = yaml.safe_load(read_text(path, remedy))
    except yaml.YAMLError as error:
        raise FormatError(f"{path} is no YAML ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, wanted a mapping of keys; {remedy}")
    return value
