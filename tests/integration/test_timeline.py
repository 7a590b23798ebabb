"""The timeline as Perfetto reads it, the live view as a terminal shows it."""

import io
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penstock.config import load_config
from penstock.display import Lines, progress
from penstock.engine.prefetch import FeedStats
from penstock.live import LiveView, RankWindow
from penstock.observation import observed
from penstock.replica import Leg
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.spans import SpanLog, Spans
from penstock.timeline import Timeline, clock_offset
from penstock.training import train


def events(value: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in value["traceEvents"] if event["ph"] == "X"]


def names(value: dict[str, Any], kind: str) -> dict[tuple[int, int], str]:
    found = [event for event in value["traceEvents"] if event["ph"] == "M" and event["name"] == kind]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in found}


def test_spans_are_kept_within_steps_and_bounds() -> None:
    spans = Spans()
    spans.at(0)
    spans.add("compute", "never", 0.0, 1.0)
    assert spans.export().spans == ()
    spans.watch((2, 4), limit=2)
    for step in range(6):
        spans.at(step)
        with spans.during("compute", f"item {step}", step=step):
            pass
    kept = spans.export()
    assert [name for _, _, name, *_ in kept.spans] == ["item 2", "item 3"] and kept.dropped == 0
    spans.at(3)
    spans.add("compute", "too many", 0.0, 1.0)
    assert spans.export().dropped == 1
    began = time.time()
    with pytest.raises(ValueError, match="x"), spans.during("compute", "raises"):
        raise ValueError("x")
    _, thread, _, start, stop, _ = kept.spans[0]
    assert thread == threading.get_ident() and stop >= start
    assert abs(kept.origin_s + stop - began) < 60


def test_hosts_are_brought_to_one_clock(tmp_path: Path) -> None:
    assert clock_offset(100.0, 950.5, 101.0) == -850.0
    one, other = threading.get_ident(), 7
    near = SpanLog(
        host="near",
        pid=11,
        origin_s=1000.0,
        dropped=0,
        spans=(("stall", one, "item 0", 1.0, 1.5, {}), ("compute", one, "item 0", 1.5, 2.0, {"item": 0})),
    )
    far = SpanLog(host="far", pid=22, origin_s=1850.0, dropped=3, spans=(("compute", other, "item 0", 1.25, 1.75, {}),))
    timeline = Timeline()
    timeline.add(1, far, offset_s=-850.0)
    timeline.add(0, near)
    timeline.write(tmp_path / "timeline.json")
    value = json.loads((tmp_path / "timeline.json").read_text())
    titles = names(value, "process_name")
    assert titles == {(1, 0): "rank 0 on near, process 11", (2, 0): "rank 1 on far, process 22"}
    lanes = names(value, "thread_name")
    shown = [(event["pid"], lanes[event["pid"], event["tid"]], event["ts"], event["dur"]) for event in events(value)]
    assert shown == [(1, "stall", 0.0, 5e5), (2, "compute", 2.5e5, 5e5), (1, "compute", 5e5, 5e5)]
    assert value["otherData"] == {"began_s": 1001.0, "dropped_spans": 3}


def test_a_chunked_run_writes_the_epochs_that_are_asked_for(tmp_path: Path) -> None:
    graph, run = tmp_path / "graph", tmp_path / "run"
    generate_graph(graph, GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1), host_memory=64 << 20)
    flags = {
        "dataset": str(graph),
        "run_dir": str(run),
        "mode": "chunked",
        "chunked.chunks": 4,
        "chunked.stages": 2,
        "model.num_layers": 3,
        "model.hidden": 8,
        "train.epochs": 5,
        "train.threads": 1,
        "track.trace_steps": (2, 4),
    }
    train(load_config(None, (), flags))
    value = json.loads((run / "timeline.json").read_text())
    assert names(value, "process_name") == {
        (1, 0): "rank 0 (part 0, stage 0)",
        (2, 0): "rank 1 (part 0, stage 1)",
        (0, 0): names(value, "process_name")[0, 0],
    }
    assert names(value, "process_name")[0, 0].startswith("driver on ")
    found = events(value)
    assert [event["ts"] for event in found] == sorted(event["ts"] for event in found)
    assert all(event["dur"] >= 0 for event in found)
    epochs = [event for event in found if event["cat"] == "epoch"]
    assert [event["name"] for event in epochs] == ["epoch 2", "epoch 3"]
    assert len([event for event in found if event["cat"] == "evaluate"]) == 2
    for rank in (0, 1):
        own = [event for event in found if event["pid"] == rank + 1]
        assert {event["args"]["epoch"] for event in own} == {2, 3}
        for kind in ("forward", "backward"):
            chunks = [e["args"]["chunk"] for e in own if e["name"] == kind and e["args"]["epoch"] == 2]
            assert sorted(chunks) == [0, 1, 2, 3]
        ends = [event["ts"] + event["dur"] for event in own]
        assert all(after["ts"] >= end - 0.01 for end, after in zip(ends, own[1:], strict=False))
        assert all(epochs[0]["ts"] - 1e5 < event["ts"] for event in own)


ENTRIES: list[dict[str, Any]] = [
    {"rank": 0, "host": "a", "step": 1200, "items_per_s": 5.25, "busy_s": 6.0, "stalls": {"feed": 1.0, "reduce": 3.0}},
    {"rank": 1, "host": "b", "step": 1200, "busy_s": 9.5, "stalls": {"reduce": 0.5}, "hit_rates": {"pack": 0.25}},
]


def grown(times: int) -> list[dict[str, Any]]:
    """What ranks say after as many windows in which each did what `ENTRIES` have."""
    return [
        {
            **entry,
            "busy_s": times * entry["busy_s"],
            "stalls": {cause: times * value for cause, value in entry["stalls"].items()},
        }
        for entry in ENTRIES
    ]


def test_the_rank_that_others_wait_for_is_named() -> None:
    window = RankWindow()
    assert window.take(ENTRIES)[0] == {"busy": 6.0, "stall": 1.0, "reduce": 3.0}
    assert window.straggler() is None, "one window says nothing"
    for times in range(2, 6):
        assert window.take(grown(times))[0] == {"busy": 6.0, "stall": 1.0, "reduce": 3.0}
    found = window.straggler()
    assert found is not None and (found.rank, found.host, found.cause) == (1, "b", "compute")
    later: list[dict[str, Any]] = [
        {"rank": 0, "busy_s": 31.0, "stalls": {"feed": 8.0, "reduce": 15.0}},
        {"rank": 1, "busy_s": 1.0, "stalls": {"reduce": 1.0}},  # it began anew
    ]
    spent = window.take(later)
    assert spent == {0: {"busy": 1.0, "stall": 3.0, "reduce": 0.0}, 1: {"busy": 1.0, "stall": 0.0, "reduce": 1.0}}
    window.take(later[:1])
    assert window.straggler() is None, "who is alone holds nobody up"


def test_lines_name_the_straggler_too(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as show:
        assert isinstance(show, Lines)
        for times in range(1, 8):
            show.ranks(grown(times))  # the last ones come too soon to say it again
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ranks: rank 1 on b is the slowest")


def test_legs_of_replicas_become_entries(tmp_path: Path) -> None:
    seen: list[list[dict[str, Any]]] = []

    class Show(LiveView):
        def ranks(self, entries: Any) -> None:
            seen.append(list(entries))

    stats = FeedStats(
        items=2, bytes_read=9, device_rows=0, host_rows=3, pack_rows=1, stall_s=0.0, read_s=0.0, assemble_s=0.0
    )
    feed: dict[str, Any] = {"feed": stats, "row_bytes": 100, "queue_bytes": 7}
    legs = [
        Leg(losses=((0, 8, 1.0), (2, 8, 0.5)), compute_s=2.0, stall_s=1.0, reduce_s=1.0, **feed),
        Leg(losses=((1, 8, 1.0), (3, 8, 0.5)), compute_s=3.0, stall_s=0.5, reduce_s=0.5, **feed),
    ]
    config = load_config(None, (), {"dataset": str(tmp_path / "graph"), "run_dir": str(tmp_path / "run")})
    with observed(config, Show(Console())) as watch:
        watch.leg(4, legs, ["a", "b"], {"checkpoint": 0.5})
        watch.leg(8, legs, ["a", "b"], {"checkpoint": 0.75})
    first, second = seen[-1]
    assert first == {
        "rank": 0,
        "host": "a",
        "step": 8,
        "items": 4.0,
        "items_per_s": 0.5,
        "busy_s": 4.0,
        "stalls": {"feeder": 2.0, "reduce": 2.0, "checkpoint": 0.75},
        "queue_bytes": 7,
        "hit_rates": {"device": 0.0, "host": 0.75, "pack": 0.25},
        "bytes": {"device": 0, "host": 300, "pack": 100},
    }
    assert (second["host"], second["busy_s"], second["stalls"]["reduce"]) == ("b", 6.0, 1.0)
    assert not (tmp_path / "run").exists()  # nothing was traced or tracked


def test_a_terminal_shows_bars_and_ranks() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    view = LiveView(console)
    view("train", 30, 120, "items", loss=1.25)
    console.print(view)
    assert "rank" not in console.export_text(clear=True)
    for times in range(1, 6):
        view.ranks(grown(times))
    console.print(view)
    text = console.export_text()
    (bar,) = [line for line in text.splitlines() if line.startswith("train")]
    assert "25%" in bar and "30 items" in bar and "loss 1.25" in bar
    heading, first, second = [line.split() for line in text.splitlines() if not line.startswith("train")][:3]
    assert heading == ["rank", "host", "step", "items/s", "stall", "reduce", "hits"]
    assert first == ["0", "a", "1,200", "5.25", "10%", "30%"]
    assert second == ["1", "b", "1,200", "0%", "5%", "75%", "straggler"]
