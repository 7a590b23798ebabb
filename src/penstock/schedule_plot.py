"""Plot what every rank did in an epoch, from measured times: a Gantt chart, one line per rank."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.spec import RankReport

_WAITS = "recv"
_LOOKS = {  # of a kind of action: what the legend calls it, and its colour
    "load": ("load rows", "#b39ddb"),
    "recv": ("wait for rows of another rank", "#ffffff"),
    "send": ("send rows", "#2a9d8f"),
    "forward": ("forward", "#4f9dd9"),
    "backward": ("backward", "#e8853b"),
    "weight": ("gradients of weights", "#f2c14e"),
    "step": ("optimizer step", "#6b4e71"),
}
_HATCH: dict[str, Any] = {"hatch": "////", "edgecolor": "#b23a48", "linewidth": 0.4}
_LABELLED = 400  # actions up to which chunk numbers are readable


def draw_schedule(
    reports: Sequence[RankReport], layout: Layout, out: Path, *, epoch: int, bubble: float, title: str
) -> None:
    """Write a PNG with a bar per action of an epoch; `bubble` is the share of the ranks' time in which they waited.

    Title and legend are in its metadata too, for who cannot see it.
    """
    import matplotlib  # 0.3 s that only the end of a run pays

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(12, 1.8 + 0.6 * len(reports)), layout="constrained")
    labelled = sum(len(report.kinds) for report in reports) <= _LABELLED
    for report in reports:
        kinds, spans = np.array(report.kinds), report.spans
        for kind, (_, colour) in _LOOKS.items():  # one collection for all bars of a kind: there may be 100,000
            bars = [(start, end - start) for start, end in spans[kinds == kind].tolist()]
            axes.broken_barh(bars, (report.rank - 0.4, 0.8), facecolors=colour, **(_HATCH if kind == _WAITS else {}))
        for kind, chunk, middle in zip(report.kinds, report.chunks, spans.mean(axis=1).tolist(), strict=True):
            if labelled and kind in ("forward", "backward"):
                axes.text(middle, report.rank, str(chunk), ha="center", va="center", fontsize=6)
    names = [f"part {layout.part_of(r.rank)} stage {layout.stage_of(r.rank)}" for r in reports]
    if layout.replicas > 1:
        names = [f"replica {layout.replica_of(r.rank)} {name}" for r, name in zip(reports, names, strict=True)]
    axes.set_yticks(range(len(reports)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the epoch began")
    axes.set_title(f"{title}, epoch {epoch}: bubble {bubble:.0%} (share of the ranks' time spent waiting)")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    seen = {kind for report in reports for kind in report.kinds}
    shown = [(kind, label, colour) for kind, (label, colour) in _LOOKS.items() if kind in seen]
    figure.legend(
        handles=[Patch(facecolor=c, label=label, **(_HATCH if kind == _WAITS else {})) for kind, label, c in shown],
        ncols=len(shown),
        loc="outside lower center",
        frameon=False,
    )
    temporary = out.with_name(f".{out.name}")
    told = {"Title": axes.get_title(), "Description": ", ".join(label for _, label, _ in shown)}
    figure.savefig(temporary, format="png", dpi=110, metadata=told)
    pyplot.close(figure)
    temporary.replace(out)
