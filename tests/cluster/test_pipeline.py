"""Actors on a cluster of two nodes, both of them this machine: what crosses, who is named, and that nothing is left."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from patience import Deadline, answer, wait_until
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from penstock.cluster.pipeline import PROCESS_BYTES, open_ray
from penstock.cluster.shared import require_shared
from penstock.engine.chunked.backend import NodeLost, NoRoomYet, RankFailed, open_board
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.schedule import plan_epoch
from penstock.storage.errors import DataError, DoesNotFit

pytestmark = [pytest.mark.ray, pytest.mark.slow]
SMALL = "small_ranks:open_small"
SCRIPT = """
import logging, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import ray, small_ranks
from penstock.cluster.pipeline import open_ray

ray.init(address={address!r}, logging_level=logging.ERROR, log_to_driver=False)
specs = small_ranks.small_specs(Path({scratch!r}))
with open_ray(specs, strategy="STRICT_SPREAD", open_rank="small_ranks:open_small") as ranks:
    print("pids", *ranks.pids, flush=True)
    ranks.call("sleep")
"""


@pytest.fixture(scope="module")
def small_ranks() -> Iterator[Any]:
    """The module of the processes' tests; actors look where the driver does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "engine" / "chunked"))
        yield import_module("small_ranks")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    """Two nodes with two CPUs each."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        found.add_node(num_cpus=2)
        ray.init(address=found.address, logging_level=logging.WARNING)
        yield found
    finally:
        ray.shutdown()
        found.shutdown()  # type: ignore[no-untyped-call]


def all_go(pids: list[int]) -> bool:
    """Whether processes end: those of this node have when the context is left, others soon."""
    deadline = Deadline(30)
    while any(psutil.pid_exists(pid) for pid in pids) and not deadline.is_over:
        time.sleep(0.02)
    return bool(pids) and not any(psutil.pid_exists(pid) for pid in pids)


def open_groups() -> list[str]:
    table: dict[str, dict[str, Any]] = placement_group_table()
    return [name for name, entry in table.items() if entry["state"] != "REMOVED"]


def test_ranks_on_two_nodes_tell_how_far_they_are(small_ranks: Any, tmp_path: Path) -> None:
    specs = small_ranks.small_specs(tmp_path)
    board, seen = open_board(specs), []

    def poll() -> None:
        seen.append([done for done, _, _ in board.read()])
        if seen[-1] == [1, 2]:
            (tmp_path / "go").touch()

    with open_ray(specs, strategy="STRICT_SPREAD", open_rank=SMALL) as backend:
        assert len(set(backend.nodes)) == 2
        backend.call("beat", poll=poll)
        weights = backend.call("weights", [(1.0,), (2.0,)])
        assert torch.equal(weights[1]["w"], torch.tensor([[2.0, 4.0], [8.0, 10.0]])) and int(weights[0]["rank"]) == 0
        payload = 5 * 5 * 4 * sum(rows * columns for rows, columns in small_ranks.SIZES)
        assert backend.call("run", [("crossfire",)] * 2) == [(payload, []), (payload, [])]
    assert seen[-1] == [1, 2]
    assert all_go(backend.pids) and not open_groups()
    assert {"closed-0", "closed-1"} <= {path.name for path in tmp_path.iterdir()}


def test_a_killed_actor_is_named_with_its_action(small_ranks: Any, tmp_path: Path) -> None:
    plan = plan_epoch(Layout(2, 1), epoch=3, order=(1, 0), gradient_mode="stale", recompute=False, defer_weights=True)
    with open_ray(small_ranks.small_specs(tmp_path), strategy="STRICT_SPREAD", open_rank=SMALL) as backend:
        near = backend.nodes.index(ray.get_runtime_context().get_node_id())
        with pytest.raises(RankFailed) as caught:  # by name: not the peer's error, whose patience is 60 s
            backend.call("train_epoch", [(plan, near, 2)] * 2)
        with pytest.raises(RuntimeError, match="ranks that failed take no more calls"):
            backend.call("sleep")
    text, actions = str(caught.value), plan.actions[near]
    assert f"rank {near} (stage {near} of 0..1, part 0 of 0..0) was lost (process {backend.pids[near]} on node" in text
    assert f"during train_epoch of epoch 3, after 2 of {len(actions)} actions, at {actions[2]}" in text
    assert all_go(backend.pids) and not open_groups()


def test_the_error_of_one_rank_is_raised_as_it_is(small_ranks: Any, tmp_path: Path) -> None:
    with open_ray(small_ranks.small_specs(tmp_path), open_rank=SMALL) as backend:
        with pytest.raises(DoesNotFit, match="history_memory=5 is too small") as caught:
            backend.call("refuse", [(1, "DoesNotFit")] * 2)
        assert caught.value.host_bytes == 7
    assert all_go(backend.pids)
    with pytest.raises(DataError, match="is not a graph; ingest one"):
        with open_ray(small_ranks.small_specs(tmp_path), open_rank="small_ranks:open_badly"):
            pytest.fail("it opened")
    assert not open_groups()


def test_a_replica_stays_on_a_node_and_replicas_are_spread(small_ranks: Any, tmp_path: Path) -> None:
    with open_ray(small_ranks.small_specs(tmp_path, replicas=2), open_rank=SMALL) as backend:
        assert backend.nodes[0] == backend.nodes[1] != backend.nodes[2] == backend.nodes[3]
        (bundles,) = [g["bundles"] for g in placement_group_table().values() if g["state"] == "CREATED"]
        assert list(bundles.values()) == [{"CPU": 2.0, "memory": 2.0 * PROCESS_BYTES}] * 2
        payload = 5 * 5 * 4 * 3 * sum(rows * columns for rows, columns in small_ranks.SIZES)
        assert backend.call("run", [("crossfire",)] * 4) == [(payload, [])] * 4
    assert all_go(backend.pids) and not open_groups()


def test_a_resource_that_no_node_has_is_told(small_ranks: Any, tmp_path: Path) -> None:
    specs = small_ranks.small_specs(tmp_path, replicas=2)
    with pytest.raises(NoRoomYet, match=r"no room for 4 ranks .*'ssd': 0.5.*do not fit the cluster's nodes"):
        with open_ray(specs, resources={"ssd": 1}, wait_s=0.5, open_rank=SMALL):
            pytest.fail("it opened")
    assert not open_groups()


def test_a_cluster_without_room_is_told(small_ranks: Any, tmp_path: Path) -> None:
    specs = small_ranks.small_specs(tmp_path, stages=3, threads=2)
    with pytest.raises(NoRoomYet, match=r"no room for 3 ranks of \{'CPU': 2.0, 'memory': \d+.0\} with strategy=PACK"):
        with open_ray(specs, wait_s=0.5, open_rank=SMALL):
            pytest.fail("it opened")
    assert not open_groups()


@pytest.mark.parametrize(
    ("device", "options", "wanted"),
    [
        ("cpu", {"memory_bytes": 1 << 45}, f"'memory': {(1 << 44) + PROCESS_BYTES:.1f}"),
        ("cuda", {}, "'GPU': 1.0"),
        ("cuda", {"gpus_per_replica": 0.5}, "'GPU': 0.25"),
    ],
)
def test_ray_is_asked_for_memory_and_for_gpus_that_are_not_there(
    device: str, options: dict[str, Any], wanted: str, small_ranks: Any, tmp_path: Path
) -> None:
    specs = [replace(spec, device=device) for spec in small_ranks.small_specs(tmp_path)]
    with pytest.raises(NoRoomYet, match=f"no room for 2 ranks of .*{wanted}.*an autoscaler starts"):
        with open_ray(specs, wait_s=0.5, open_rank=SMALL, **options):
            pytest.fail("it opened")
    assert not open_groups()


def test_a_rank_uses_one_gpu(small_ranks: Any, tmp_path: Path) -> None:
    specs = [replace(spec, device="cuda") for spec in small_ranks.small_specs(tmp_path)]
    with pytest.raises(ValueError, match="gpus_per_replica=4 is more than one for each of the 2 ranks"):
        with open_ray(specs, gpus_per_replica=4, open_rank=SMALL):
            pytest.fail("it opened")


def test_nodes_that_lack_the_runs_files_are_named(small_ranks: Any, tmp_path: Path) -> None:
    graph, specs = tmp_path / "graph", small_ranks.small_specs(tmp_path)
    told = rf"mode=chunked: .*\(.*\) lacks {graph}; .* lacks {graph}\. Put both on a file system that all nodes mount"
    with pytest.raises(ValueError, match=told):
        require_shared(graph, tmp_path, address=None, resources={}, num_cpus=1)
    with pytest.raises(ValueError, match=f"lacks {graph}"):
        with open_ray(specs, shared=(graph, tmp_path), open_rank=SMALL):
            pytest.fail("it opened")
    graph.mkdir()
    (graph / "manifest.json").touch()
    require_shared(graph, tmp_path, address=None, resources={}, num_cpus=1)
    with open_ray(specs, shared=(graph, tmp_path), open_rank=SMALL) as backend:
        assert len(backend.call("weights", [(1.0,)] * 2)) == 2
    assert not list(tmp_path.glob(".seen-*"))


def test_room_that_comes_is_waited_for_longer_than_a_rank_may_be_silent(
    small_ranks: Any, tmp_path: Path, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    specs, found = small_ranks.small_specs(tmp_path, timeout_s=5.0), list[str]()

    def opens() -> None:
        with open_ray(specs, resources={"late": 2}, wait_s=600.0, open_rank=SMALL) as backend:
            found.extend(backend.nodes)

    opener = threading.Thread(target=opens)
    opener.start()
    wait_until(lambda: "waiting for room for 2 ranks" in caplog.text, 60)
    time.sleep(specs[0].timeout_s)
    late = cluster.add_node(num_cpus=2, resources={"late": 2})
    try:
        opener.join()
    finally:
        cluster.remove_node(late)
    assert set(found) == {late.node_id} and "for 600 s at most (cluster.wait_s)" in caplog.text


def test_an_actor_that_a_signal_stopped_on_another_node_is_named_with_its_stack(
    small_ranks: Any, tmp_path: Path
) -> None:
    specs = small_ranks.small_specs(tmp_path, timeout_s=3.0)
    board = open_board(specs)
    with open_ray(specs, strategy="STRICT_SPREAD", open_rank=SMALL) as backend:
        far = 1 - backend.nodes.index(ray.get_runtime_context().get_node_id())

        def poll() -> None:
            if board.read()[far][0] > 0:
                os.kill(backend.pids[far], signal.SIGSTOP)

        with pytest.raises(RankFailed) as caught:
            backend.call("beat", poll=poll)
    text = str(caught.value)
    assert text.startswith(f"rank {far} (stage {far} of 0..1, part 0 of 0..0) did not move for ")
    assert f"(process {backend.pids[far]} on node {backend.nodes[far]}, host " in text
    assert f"during beat, after at least {far + 1} of 9 actions" in text
    assert "Its own:\nstopped by a signal (SIGSTOP)" in text and "in beat" in text
    assert (tmp_path / "stacks.txt").read_text().count("in beat") == 2
    assert not any(psutil.pid_exists(pid) for pid in backend.pids) and not open_groups()


def test_a_lost_node_is_named_and_the_next_ranks_open_on_those_that_are_left(
    small_ranks: Any, tmp_path: Path, cluster: Cluster
) -> None:
    doomed = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    with open_ray(small_ranks.small_specs(tmp_path, stages=3), strategy="STRICT_SPREAD", open_rank=SMALL) as backend:
        rank = backend.nodes.index(doomed.node_id)

        def poll() -> None:
            nonlocal doomed
            if doomed is not None and (tmp_path / f"asleep-{rank}").exists():
                cluster.remove_node(doomed, allow_graceful=False)
                doomed = None

        with pytest.raises(NodeLost, match=rf"rank {rank} \(.* was lost with its node \(process .*during sleep"):
            backend.call("sleep", poll=poll)
    assert all_go(backend.pids) and not open_groups()
    with open_ray(small_ranks.small_specs(tmp_path), strategy="STRICT_SPREAD", open_rank=SMALL) as backend:
        assert len(backend.call("weights", [(1.0,)] * 2)) == 2


def test_actors_end_with_a_killed_driver(small_ranks: Any, tmp_path: Path, cluster: Cluster) -> None:
    script = tmp_path / "script.py"
    folder = str(Path(small_ranks.__file__).parent)
    script.write_text(SCRIPT.format(folder=folder, address=cluster.address, scratch=str(tmp_path / "scratch")))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in answer(driver.stdout, "pids")]
        os.kill(pids[0], signal.SIGSTOP)  # also what cannot hear of it
        driver.kill()
        driver.communicate()
    assert len(pids) == 2 and all_go(pids)
