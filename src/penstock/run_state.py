"""What a run folder says of the run, while it runs and after, for `penstock inspect`.

| status | is |
|---|---|
| `running` | a process has the folder |
| `ok`, `stopped`, `failed` | as `result.json` has it |
| `cut off` | there are checkpoints, no result, and no process: it was killed; the same command goes on |
| `not trained` | there are neither: it was planned or packed, or had just begun |
"""

import fcntl
import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.live import format_amount, format_left, format_rate
from penstock.locations import EXPERIMENTS, experiments
from penstock.records import epoch_records
from penstock.report import read_config
from penstock.status import NAME as STATUS
from penstock.storage.budget import format_bytes
from penstock.storage.errors import FormatError
from penstock.storage.manifest import read_json
from penstock.storage.pack import open_packset
from penstock.storage.remote.hostlock import describe_owner
from penstock.summary import Row, result_rows

_SHOWN_EPOCHS = 20


def describe_state(path: Path) -> dict[str, Any]:
    """Everything, as JSON; only reads, also beside the process that works on the run."""
    config, result = read_config(path / "config.yaml"), _read(path / "result.json")
    root = path.parent.parent if path.parent.name == EXPERIMENTS else path
    holder = _holder(root / ".lock")
    if experiments(root) and not (path / STATUS).is_file():
        holder = None  # it works on another experiment
    checkpoints = sorted(folder.name for folder in (path / "checkpoints").glob("step-*"))
    packs = sorted(file.parent for file in root.rglob("packset.json"))
    train: dict[str, Any] = config.get("train") or {}
    status = "running" if holder else result.get("status", "cut off" if checkpoints else "not trained")
    value: dict[str, Any] = {
        "kind": "run",
        "mode": config.get("mode", "sampled"),
        "status": status,
        "dataset": config["dataset"],
        **({"holder": holder} if holder else {}),
        **({"now": _read(path / STATUS)} if holder and (path / STATUS).is_file() else {}),
        **({"error": result["error"]["message"]} if not holder and result.get("error") else {}),
        "asked_epochs": train.get("epochs"),
        "metric": train.get("metric"),
        "epochs": epoch_records(path / "metrics.jsonl"),
        "metrics": result.get("metrics", {}),
        "plan": _plan(root),
        "checkpoints": checkpoints,
        "pack_bytes": sum(file.stat().st_size for folder in packs for file in folder.glob("window-*.pack")),
        "pack_sets": {str(folder.relative_to(root)): _windows(folder) for folder in packs},
    }
    return value | {"result": {key: result[key] for key in ("timings", "throughput", "config") if key in result}}


def state_rows(value: Mapping[str, Any]) -> list[Row]:
    """What of it is one line each."""
    rows = [("status", _status(value)), *_now_rows(value)]
    if value["status"] == "ok":
        rows += result_rows({**value["result"], "metrics": value["metrics"]})
    rows += [("mode", value["mode"]), ("dataset", str(value["dataset"]))]
    plan = value["plan"]
    if plan:
        share = f", {format_bytes(plan['read_bytes_per_epoch'])} read per epoch"
        rows.append(("plan", f"{plan['mode']}, policy {plan['policy']}, {plan['row_dtype']}{share}"))
    if value["pack_sets"]:
        sets = ", ".join(f"{name.removesuffix('/packs')} {windows}" for name, windows in value["pack_sets"].items())
        rows.append(("packs", f"{format_bytes(value['pack_bytes'])}: {sets}"))
    rows.append(("checkpoints", ", ".join(value["checkpoints"]) or "none yet"))
    if value.get("validated"):
        rest = ", ".join(value["files_without_checksum"]) or "none"
        rows += [("validated", f"{value['files_checked']} files"), ("without checksum", rest)]
    return rows


def epoch_table(value: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows of the last epochs, and of the best one; `*` marks it."""
    epochs, metric = value["epochs"], value["metric"] or "accuracy"
    best = epochs[-1].get("best_epoch") if epochs else None
    shown = [entry for entry in epochs[:-_SHOWN_EPOCHS] if entry["epoch"] == best] + epochs[-_SHOWN_EPOCHS:]
    names = [f"valid_{name}" for name in dict.fromkeys(("loss", "accuracy", metric))]
    if all(entry.get(f"valid_{metric}") == entry.get("valid_accuracy") for entry in epochs):
        names = names[:2]  # with one label per node micro F1 is the accuracy
    headings = ("epoch", "loss", *(name.replace("_", " ") for name in names), "items/s")
    rows = []
    for entry in shown:
        cells = [f"{entry[name]:.4f}" if name in entry else "" for name in names]
        rate = f"{entry['items_per_s']:,.4g}" if "items_per_s" in entry else ""
        number = f"{entry['epoch']}{' *' if entry['epoch'] == best else ''}"
        rows.append((number, f"{entry['train_loss']:.4f}", *cells, rate))
    return headings, rows


def _status(value: Mapping[str, Any]) -> str:
    again = "run the same command again to continue"
    texts = {
        "running": f"running: {value.get('holder')}",
        "ok": "finished",
        "cut off": f"cut off, no process has it; {again}",
        "not trained": "not trained yet",
    }
    error = f": {value['error']}" if "error" in value else ""
    return texts.get(value["status"], f"{value['status']}{error}")


def _now_rows(value: Mapping[str, Any]) -> list[Row]:
    now, rows = value.get("now") or {}, []
    if stage := now.get("stage"):
        text = f"{stage['name']}: {format_amount(stage['done'], stage['unit'])}"
        text += f" of {format_amount(stage['total'], stage['unit'])}"
        text += f", {format_rate(stage['rate'], stage['unit'])}" if stage["rate"] else ""
        is_known = stage["left_s"] is not None and not now.get("epoch")  # epochs know better
        rows.append(("now", text + (f", {format_left(stage['left_s'])} left" if is_known else "")))
    done, asked = value["epochs"][-1]["epoch"] if value["epochs"] else 0, value["asked_epochs"]
    if value["status"] in ("running", "stopped", "cut off", "failed") and asked:
        left_s = (now.get("epoch") or {}).get("left_s")
        left = "" if left_s is None else f", {format_left(left_s)} left"
        rows.append(("epochs", f"{done} of {asked}{left}"))
    if value["status"] != "ok" and value["epochs"] and (best := value["epochs"][-1].get("best_epoch")):
        rows.append(("best epoch", str(best)))
    return rows


def _holder(lock: Path) -> str | None:
    """Who works in the folder; None where nobody does.

    A file without text has no holder. One with text is tried, since who was killed leaves it.
    """
    try:
        with open(lock) as file:
            text = file.read()
            if not text:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return describe_owner(text)
    except FileNotFoundError:
        return None
    owner = _parse(text)
    away = owner.get("host") not in (None, socket.gethostname())
    return f"{describe_owner(text)}, if it is still at work there" if away else None


def _parse(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _plan(path: Path) -> dict[str, Any]:
    """The plan of training, in sampled mode."""
    keys = ("mode", "policy", "row_dtype", "read_bytes_per_epoch", "items_per_epoch", "host_slots", "num_items")
    found = _read(path / "train" / "plan.json")
    return {key: found[key] for key in keys} if set(keys) <= set(found) else {}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _windows(packs: Path) -> str:
    try:
        meta = open_packset(packs)
    except FormatError as error:
        return str(error)
    return f"{len(list(packs.glob('window-*.json')))} of {meta.num_windows} windows"
