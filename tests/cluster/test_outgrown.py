"""Windows of feeders that items outgrow: the remedy of the message is to resume; it works, and a run does so itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.cluster.feeder_pool import open_feeder_processes
from penstock.cluster.lane import Pace
from penstock.cluster.pulling import open_pulled_feed
from penstock.config import load_config
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.sampler.seeds import epoch_order
from penstock.storage.budget import Budgets
from penstock.storage.errors import Outgrown
from penstock.storage.graph import GraphStore
from penstock.training import train

PACE = Pace(answer_s=20.0, slow_s=20.0, timeout_s=60.0)


def test_an_item_larger_than_expected_is_made_room_for_by_those_who_start_again(
    make_graph: Callable[..., GraphStore], tmp_path: Path
) -> None:
    """A seed of 300 neighbours, where those that windows are sized by have 3: every start takes more until it fits."""
    order, rng = epoch_order(np.arange(1000, dtype=np.int32), 0, 0), np.random.default_rng(0)
    edges = np.stack([rng.integers(0, 1000, 3000), np.repeat(np.arange(1000), 3)], axis=1)
    hub = np.stack([np.arange(300), np.full(300, order[4 * 60])], axis=1)
    graph = make_graph(1000, np.concatenate([edges, hub]))
    sample, attempts, seen = SampleConfig(fanouts=(-1,), batch_size=4), 0, 0
    settings: dict[str, Any] = {"sample": sample, "plan": PlanConfig(), "stop_step": 80, "pace": PACE, "threads": 1}
    settings["budgets"] = Budgets(device_bytes=0, host_bytes=1 << 20, disk_bytes=1 << 20)
    with open_feeder_processes(graph.path, tmp_path / "disk", count=1, disk_bytes=1 << 20, memory=64 << 20) as own:
        own.wait_ready(60, count=1)
        while seen < 80:
            attempts += 1
            try:
                with open_pulled_feed(
                    own.addresses, own.token, packs=tmp_path / "packs", start_step=seen, **settings
                ) as found:
                    for batch in found.feed:
                        assert batch.step == seen
                        seen += 1
            except Outgrown as error:
                assert "resume the run" in str(error) and attempts < 8
    assert attempts > 1


@pytest.mark.slow
def test_a_run_with_feeders_makes_room_by_itself(
    make_graph: Callable[..., GraphStore], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As above, seen from outside: one call that ends well, with the weights of a run without feeders."""
    order, rng = epoch_order(np.arange(1000, dtype=np.int32), 0, 0), np.random.default_rng(0)
    edges = np.stack([rng.integers(0, 1000, 3000), np.repeat(np.arange(1000), 3)], axis=1)
    hub = np.stack([np.arange(300), np.full(300, order[4 * 60])], axis=1)
    graph = make_graph(1000, np.concatenate([edges, hub]), features=rng.random((1000, 4)).astype(np.float32))
    weights = []
    for name, feeders in (("fed", 1), ("own", 0)):
        flags: dict[str, Any] = {"dataset": graph.path, "run_dir": tmp_path / name, "cluster.feeders": feeders}
        flags |= {"sampler.fanouts": (-1,), "sampler.batch_size": 4, "train.epochs": 1, "evaluate.mode": "none"}
        flags |= {"plan.mode": "rolling", "train.threads": 1}
        result = train(load_config(flags=flags))
        assert result["status"] == "ok" and result["metrics"]["steps"] == 250 and not result.get("restarts")
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    told = [record.message for record in caplog.records if "with more room" in record.message]
    assert 1 <= len(told) < 8 and all("rows, " in line and "were expected" in line for line in told)
