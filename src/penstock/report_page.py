"""`report.html`: one page that shows a run to who was not there; it needs no other file and no network.

It is made of `result.json` and `metrics.jsonl`: numbers, curves, where the time went, the plan, the picture of the
schedule, every epoch, and the configuration that was given. It is readable from 360 pixels on: panels wrap, and
wide tables and pictures scroll in place.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from penstock.config import RunConfig
from penstock.curves import curve_panels
from penstock.effects import chosen
from penstock.sampler.estimate import DiskRates, PlanSummary, summary_rows
from penstock.storage.budget import format_bytes
from penstock.storage.manifest import write_atomic
from penstock.summary import format_seconds, result_rows

PAGE = "report.html"
_COLOURS = ("#1f5fa8", "#c4571b", "#2a9d8f", "#b23a48", "#e9b44c", "#6b4e71", "#8a97a3", "#5aa469")
_BARS = {
    "total": ("prepare", "train", "test", "save"),
    "prepare": ("sample", "plan", "pack", "cut", "setup"),
    "train": ("start", "compute", "stall", "reduce", "evaluate", "checkpoint", "record"),
}
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px; color: #1d2730; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 10px; }
.under { color: #5f6b76; margin: 2px 0 18px; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px; }
.panels svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
.scroll img { display: block; width: 100%; min-width: 720px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 18px 5px 0; border-bottom: 1px solid #e3e8ec; }
th { font-weight: 600; }
.facts th { white-space: nowrap; font-weight: 400; color: #5f6b76; }
.facts td { overflow-wrap: anywhere; }
.epochs { max-height: 420px; overflow: auto; }
.epochs th { position: sticky; top: 0; background: #fff; white-space: nowrap; }
.best td { font-weight: 600; background: #f1f6fb; }
.bar { display: flex; height: 24px; margin: 2px 0; background: #eef1f4; }
.bar span { min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 2px 0 14px; padding: 0; list-style: none;
  font-size: 13px; }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 6px; }
code, pre { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
pre { overflow-x: auto; background: #f6f8fa; padding: 12px; margin: 0; }
@media (max-width: 480px) { body { padding: 14px; } th, td { padding-right: 10px; } }
"""


def write_page(run_dir: Path, result: Mapping[str, Any], config: RunConfig) -> Path:
    """Write the page of a run that is done; `result` is what `result.json` will hold, without secrets."""
    name = run_dir.absolute().name
    sections = [
        ("Outcome", _facts(result_rows(result))),
        ("Curves", f'<div class="panels">{"".join(curve_panels(run_dir, config.train.metric))}</div>'),
        ("Where the time went", _bars(result["timings"])),
        ("Schedule of the last epoch", _picture(run_dir / "schedule.png", "What every rank did when")),
        ("Plan", _facts(_plan_rows(result))),
        ("Memory and movement", _facts(_movement_rows(result))),
        ("Epochs", _epochs(result["epochs"])),
        ("Configuration that was given", _given(config)),
        ("Made with", _facts(_machine_rows(result))),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{text}</section>\n" for title, text in sections if text)
    under = f"{config.mode} training of {config.dataset}, finished {result['finished_at']}, graph {result.get('graph')}"
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style></head>\n"
        f'<body><h1>{escape(name)}</h1><p class="under">{escape(under)}</p>\n{body}</body></html>\n'
    )
    write_atomic(run_dir / PAGE, page.encode())
    return run_dir / PAGE


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{cells}</table>' if cells else ""


def _bars(timings: Mapping[str, Any]) -> str:
    return "".join(_bar(name, parts, timings) for name, parts in _BARS.items() if timings.get(f"{name}_s"))


def _bar(name: str, parts: Sequence[str], timings: Mapping[str, Any]) -> str:
    total = timings[f"{name}_s"]
    spent = [(part, timings.get(f"{part}_s", 0.0), _COLOURS[n]) for n, part in enumerate(parts)]
    spent = [(part, seconds, colour) for part, seconds, colour in spent if seconds > 0]
    drawn = "".join(
        f'<span style="flex:{seconds / total:.6f};background:{colour}" title="{part} {format_seconds(seconds)}"></span>'
        for part, seconds, colour in spent
    )
    legend = "".join(
        f'<li><i style="background:{colour}"></i>{part} {format_seconds(seconds)} ({seconds / total:.0%})</li>'
        for part, seconds, colour in spent
    )
    return (
        f"<div><strong>{name}</strong> {format_seconds(total)}</div>"
        f'<div class="bar" role="img" aria-label="{name}">{drawn}</div><ul class="legend">{legend}</ul>'
    )


def _picture(path: Path, alt: str) -> str:
    if not path.is_file():
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<div class="scroll"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'


def _plan_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    if plan := result.get("plan"):
        return summary_rows(PlanSummary(**{**plan, "disk_rates": DiskRates(**plan["disk_rates"])}))
    chunks, schedule = result.get("chunks"), result.get("schedule")
    if not chunks or not schedule:
        return []
    rows = [
        ("chunks", f"{chunks['num_chunks']} per part, cut by {chunks['method']}"),
        ("ranks", f"{schedule['stages']} stages, {schedule['parts']} parts, {schedule['replicas']} replicas"),
        ("cut edges", f"{chunks['cut_edges'] / max(1, chunks['num_edges']):.1%}"),
    ]
    if "bubble" in schedule:
        rows.append(("bubble", f"{schedule['bubble']:.0%} of the ranks' time in the last epoch"))
        rows.append(("sent between ranks", f"{format_bytes(schedule['sent_bytes'])} in the last epoch"))
    return rows


def _movement_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    metrics, memory = result["metrics"], result.get("memory")
    rows = [("features", format_bytes(metrics["feature_bytes"]))] if "feature_bytes" in metrics else []
    if "host_memory_bytes" in metrics:
        rows.append(("host memory given", format_bytes(metrics["host_memory_bytes"])))
    rows.append(("peak memory of the process", format_bytes(result["peak_rss_bytes"])))
    if memory:
        rows.append(("peak memory as predicted", format_bytes(memory["predicted_peak_bytes"])))
    if result.get("bytes_read") is not None:
        rows.append(("bytes read", format_bytes(result["bytes_read"])))
    if rates := result.get("hit_rates"):
        rows.append(("rows came from", ", ".join(f"{tier} {share:.1%}" for tier, share in rates.items())))
    if straggler := result.get("straggler"):
        rows.append(("straggler", f"rank {straggler['rank']} on {straggler['host']}, mostly at {straggler['cause']}"))
    return rows


def _epochs(epochs: Sequence[Mapping[str, Any]]) -> str:
    if not epochs:
        return ""
    names = ("train_loss", "valid_loss", "valid_accuracy", "valid_micro_f1", "valid_macro_f1", "items_per_s")
    shown = [name for name in names if any(name in entry for entry in epochs)]
    best = epochs[-1].get("best_epoch")
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ("epoch", *shown))
    rows = []
    for entry in epochs:
        cells = "".join(f"<td>{entry[name]:.4g}</td>" if name in entry else "<td></td>" for name in shown)
        mark = ' class="best"' if entry["epoch"] == best else ""
        rows.append(f"<tr{mark}><td>{entry['epoch']}{' (best)' if mark else ''}</td>{cells}</tr>")
    return f'<div class="epochs"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _given(config: RunConfig) -> str:
    values = {key: value for key, value in chosen(config).items() if not key.startswith("remote.")}
    plain = json.loads(json.dumps(values, default=str))
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in plain.items())
    return f"<pre>{escape(text)}</pre>"


def _machine_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(version)) for name, version in result["versions"].items() if version]
    hardware = result["hardware"]
    machine = f"{hardware.get('cores')} cores, {format_bytes(hardware.get('memory_bytes', 0))}"
    return [*rows, ("commit", str(result.get("git_commit"))), ("machine", machine)]
