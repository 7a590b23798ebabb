"""Draw what a run learned: `curves.png`, and the same panels one by one for the report."""

import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from penstock.records import epoch_records, read_metrics

_TRAIN, _VALID, _BEST = "#1f5fa8", "#c4571b", "#5f6b76"


def draw_curves(run_dir: Path, metric: str) -> Path:
    """Write `curves.png` of a run: losses beside the metrics of the valid split."""
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2))
    _draw_loss(panels[0], run_dir)
    _draw_metric(panels[1], run_dir, metric)
    figure.suptitle(f"{run_dir.absolute().name}: {_outcome(run_dir, metric)}", fontsize=12)
    figure.tight_layout()
    out = run_dir / "curves.png"
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Title": figure.get_suptitle()})
    pyplot.close(figure)
    temporary.replace(out)
    return out


def curve_panels(run_dir: Path, metric: str) -> list[str]:
    """The two panels as SVG to put into a page."""
    pyplot, found = _pyplot(), []
    for name in ("loss", "metric"):
        with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
            figure, axes = pyplot.subplots(figsize=(5.4, 3.6))
            if name == "loss":
                _draw_loss(axes, run_dir)
            else:
                _draw_metric(axes, run_dir, metric)
            figure.tight_layout()
            text = StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
            pyplot.close(figure)
        found.append(_embeddable(text.getvalue(), name))
    return found


def _embeddable(svg: str, name: str) -> str:
    """The element of a picture that takes the width it is given; several in one page have ids of their own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)


def _pyplot() -> Any:
    import matplotlib  # 0.3 s that only the end of a run pays

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_loss(axes: Any, run_dir: Path) -> None:
    """Training loss per item, where it was logged, and per epoch; loss of the valid split."""
    lines, epochs = read_metrics(run_dir / "metrics.jsonl"), epoch_records(run_dir / "metrics.jsonl")
    items = [(line["epoch"], line["loss"]) for line in lines if "loss" in line]
    if items:
        axes.plot(*zip(*items, strict=True), color=_TRAIN, alpha=0.35, linewidth=1, marker=".", label="train, items")
    _plot(axes, epochs, "train_loss", _TRAIN, "train, epochs")
    _plot(axes, epochs, "valid_loss", _VALID, "valid")
    _finish(axes, epochs, "loss")


def _draw_metric(axes: Any, run_dir: Path, metric: str) -> None:
    """Accuracy of the valid split, and the metric that the best epoch is judged by."""
    epochs = epoch_records(run_dir / "metrics.jsonl")
    _plot(axes, epochs, "valid_accuracy", _VALID, "valid accuracy")
    values = [entry.get(f"valid_{metric}") for entry in epochs]
    if metric != "loss" and values != [entry.get("valid_accuracy") for entry in epochs]:
        _plot(axes, epochs, f"valid_{metric}", _TRAIN, f"valid {metric.replace('_', ' ')}")
    if not axes.lines:
        axes.text(0.5, 0.5, "nothing was evaluated", ha="center", va="center", transform=axes.transAxes)
    _finish(axes, epochs, "valid split")


def _plot(axes: Any, epochs: Sequence[dict[str, Any]], key: str, colour: str, label: str) -> None:
    points = [(entry["epoch"], entry[key]) for entry in epochs if key in entry]
    if points:
        marker = "o" if len(points) <= 60 else None
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label)


def _finish(axes: Any, epochs: Sequence[dict[str, Any]], title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    best = epochs[-1].get("best_epoch") if epochs else None
    if best is not None:
        axes.axvline(best, color=_BEST, linestyle=":", linewidth=1.5, label=f"best: epoch {best}")
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last = epochs[-1]["epoch"] if epochs else 1
    axes.set_xlim(0 if axes.lines and min(axes.lines[0].get_xdata()) < 1 else 0.8, last + 0.2)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def _outcome(run_dir: Path, metric: str) -> str:
    epochs = epoch_records(run_dir / "metrics.jsonl")
    if not epochs:
        return "no epoch"
    text = f"{epochs[-1]['epoch']} epochs"
    if "best" in epochs[-1]:
        text += f", best valid {metric.replace('_', ' ')} {epochs[-1]['best']:.4f} after {epochs[-1]['best_epoch']}"
    return text
