"""Plot what every rank did in an epoch, from measured times: a Gantt chart, one line per rank."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.spec import RankReport

_COLOURS = {
    "load": "#b39ddb",
    "recv": "#e0e0e0",
    "send": "#9e9e9e",
    "forward": "#4f9dd9",
    "backward": "#e8853b",
    "weight": "#f2c14e",
    "step": "#5aa469",
}
_LABELLED = 400  # actions up to which chunk numbers are readable


def draw_schedule(reports: Sequence[RankReport], layout: Layout, out: Path) -> None:
    """Write a PNG with a bar per action; waiting for rows shows as light grey."""
    import matplotlib  # 0.3 s that only the end of a run pays

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.6 * len(reports)))
    labelled = sum(len(report.kinds) for report in reports) <= _LABELLED
    for report in reports:
        kinds, spans = np.array(report.kinds), report.spans
        for kind, colour in _COLOURS.items():  # one collection for all bars of a kind: there may be 100,000
            bars = [(start, end - start) for start, end in spans[kinds == kind].tolist()]
            axes.broken_barh(bars, (report.rank - 0.4, 0.8), facecolors=colour)
        for kind, chunk, middle in zip(report.kinds, report.chunks, spans.mean(axis=1).tolist(), strict=True):
            if labelled and kind in ("forward", "backward"):
                axes.text(middle, report.rank, str(chunk), ha="center", va="center", fontsize=6)
    names = [f"part {layout.part_of(r.rank)} stage {layout.stage_of(r.rank)}" for r in reports]
    if layout.replicas > 1:
        names = [f"replica {layout.replica_of(r.rank)} {name}" for r, name in zip(reports, names, strict=True)]
    axes.set_yticks(range(len(reports)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the epoch began")
    axes.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in _COLOURS.items()],
        ncols=len(_COLOURS),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.35),
        frameon=False,
    )
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, format="png", dpi=110, bbox_inches="tight")
    pyplot.close(figure)
    temporary.replace(out)
