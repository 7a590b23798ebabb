"""Metrics as Prometheus would scrape them from a real node, and a dashboard that asks for no others."""

import json
import logging
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray
from patience import Deadline

from penstock.cluster.metrics import METRICS, RayMetrics

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana.json"
LINE = re.compile(r"^ray_(?P<name>penstock_\w+)\{(?P<tags>.*)\} (?P<value>\S+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Where a local node offers its metrics."""
    pytest.importorskip(
        "prometheus_client", reason="Ray exports metrics only with its extra: pip install 'ray[default]'"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options: Any = {"_metrics_export_port": port, "_system_config": {"metrics_report_interval_ms": 300}}
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level=logging.WARNING, **options)
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        ray.shutdown()


def scrape(endpoint: str) -> dict[tuple[str, str], float]:
    """Values by name and by the tags that are ours, sorted."""
    try:
        with urllib.request.urlopen(endpoint, timeout=5) as answer:
            text = answer.read().decode()
    except OSError:  # the agent is not up yet
        return {}
    found = {}
    for line in LINE.finditer(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', line["tags"]))
        own = [f"{key}={tags[key]}" for key in METRICS[line["name"]][1]]
        found[line["name"], " ".join(own)] = float(line["value"])
    return found


@pytest.mark.ray
def test_a_node_offers_the_numbers_of_a_run(endpoint: str) -> None:
    metrics = RayMetrics("run-1")
    place = {"rank": 1, "stage": 0, "host": "node-7"}
    first = {"items": 10, "items_per_s": 2.5, "busy_s": 3.0, "bytes": {"pack": 100, "host": 40}, "queue_bytes": 64}
    later = {"items": 14, "stalls": {"feed": 0.5, "reduce": 0.25}, "hit_rates": {"host": 0.75}, "bytes": {"pack": 130}}
    anew = {"items": 3, "stalls": {"feed": 0.125}}  # the rank was started again
    metrics.observe({"step": 10, "epoch": 0.5, "loss": 2.0, "items_per_s": 5.0, "ranks": [place | first]})
    metrics.observe({"step": 20, "epoch": 1, "train_loss": 1.5, "valid_accuracy": 0.75, "ranks": [place | later]})
    metrics.observe({"step": 30, "epoch": 1.5, "loss": 1.0, "bubble": 0.25, "restarts": 1, "ranks": [place | anew]})
    at = "run=run-1 rank=1 stage=0 host=node-7"
    wanted = {
        ("penstock_step", "run=run-1"): 30.0,
        ("penstock_epoch", "run=run-1"): 1.5,
        ("penstock_loss", "run=run-1"): 1.0,
        ("penstock_valid_accuracy", "run=run-1"): 0.75,
        ("penstock_run_items_per_s", "run=run-1"): 5.0,
        ("penstock_bubble", "run=run-1"): 0.25,
        ("penstock_restarts_total", "run=run-1"): 1.0,
        ("penstock_items_total", at): 17.0,
        ("penstock_items_per_s", at): 2.5,
        ("penstock_busy_seconds_total", at): 3.0,
        ("penstock_queue_bytes", at): 64.0,
        ("penstock_bytes_total", f"{at} tier=pack"): 130.0,
        ("penstock_bytes_total", f"{at} tier=host"): 40.0,
        ("penstock_hit_rate", f"{at} tier=host"): 0.75,
        ("penstock_stall_seconds_total", f"{at} cause=feed"): 0.625,
        ("penstock_stall_seconds_total", f"{at} cause=reduce"): 0.25,
    }
    assert {name for name, _ in wanted} == set(METRICS)
    found: dict[tuple[str, str], float] = {}
    deadline = Deadline(60)
    while found != wanted and not deadline.is_over:
        found = scrape(endpoint)
        time.sleep(0.1)
    assert found == wanted


def test_the_dashboard_asks_for_metrics_that_are_there() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    asked = set()
    for panel in panels:
        assert panel["title"] and panel["targets"] and panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            names = set(re.findall(r"ray_(penstock_\w+)\{run=~\"\$run\"\}", target["expr"]))
            assert names and names == set(re.findall(r"ray_(\w+)", target["expr"]))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(METRICS[min(names)][1])
            is_counter = min(names).endswith("_total")
            assert "rate(" in target["expr"] or not is_counter or panel["type"] == "stat"
            asked |= names
    assert asked == set(METRICS)
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert re.findall(r"ray_(\w+), run\)", variables["run"]["definition"]) == ["penstock_step"]


def test_panels_of_the_dashboard_have_places_of_their_own() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = []
    for place in (panel["gridPos"] for panel in panels):
        assert 0 <= place["x"] and place["x"] + place["w"] <= 24
        cells += [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
    cells.sort()
    assert all(one != other for one, other in pairwise(cells))
