"""What a run leaves behind: `result.json`, the resolved configuration, `curves.png`."""

import json
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
    """Write `result.json` and, where asked, a copy, without secrets; both atomically, making parent folders."""
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read `metrics.jsonl`; empty where there is none, and without lines that are damaged: nothing depends on it."""
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            found += [json.loads(line)] if line else []
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


def draw_curves(metrics: Path, out: Path) -> None:
    """Plot loss and accuracies over epochs."""
    import matplotlib  # 0.3 s that only the end of a run pays

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = read_metrics(metrics)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for name, axes in (("loss", left), ("valid_loss", left), ("valid_accuracy", right)):
        points = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None and "epoch" in line]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
    temporary.replace(out)
