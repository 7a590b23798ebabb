"""Whoever is killed, and whenever: a run on a cluster of three nodes ends with the same weights, and leaves nobody.

One run in which everybody is killed in turn is always made. PENSTOCK_KILLS (default 0) is how often each victim is also
killed in a run of its own, at moments drawn over the length of a straight run.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from patience import Deadline, allowed_s
from ray.cluster_utils import Cluster

from penstock.storage.generate import GenerateConfig, generate_graph

# Ray drops a socket that it did not close when nodes are added
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
KILLS = int(os.environ.get("PENSTOCK_KILLS", "0"))
only_when_asked = pytest.mark.skipif(KILLS == 0, reason="set PENSTOCK_KILLS to a number of kills")
SILENCE_S = 30.0  # of an idle machine
POLL_S = 0.1
EPOCHS = 24
RETRY = 75
OPTIONS = {
    "sampler.fanouts": "[4,4]",
    "sampler.batch_size": "64",
    "model.hidden": "16",
    "model.norm": "batch",
    "train.accumulate": "4",
    "train.epochs": str(EPOCHS),
    "train.evaluate_every": "4",
    "train.checkpoint_items": "40",
    "train.log_every": "4",
    "train.threads": "1",
    "budgets.host_memory": "64MiB",
    "cluster.replica_resources": '{"trainer": 1}',
    "cluster.feeder_resources": '{"feeder": 1}',
    "cluster.timeout_s": "600",  # a hang that only the watchdog ends is longer than SILENCE_S, also on a busy machine
}


class Machines:
    """A head node, with room for the feeder, and two nodes with room for a replica each."""

    def __init__(self) -> None:
        self._cluster: Any = None
        self.start()

    def start(self) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"feeder": 1}, "include_dashboard": False}
        )
        for _ in range(2):
            self.add_trainer()

    def add_trainer(self) -> None:
        self._cluster.add_node(num_cpus=2, resources={"trainer": 1})

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def raylets(self) -> dict[int, Any]:
        """Nodes by the process ids of their raylets."""
        nodes = self._cluster.list_all_nodes()
        return {node.all_processes["raylet"][0].process.pid: node for node in nodes}

    def actors(self, name: str = "") -> list[psutil.Process]:
        """Processes of our actors, of all nodes that are there."""
        found, names = [], (name,) if name else ("RankActor", "FeederActor")
        raylets = self.raylets()
        for process in psutil.process_iter():
            try:
                if process.ppid() in raylets and process.cmdline()[:1]:
                    title = process.cmdline()[0]
                    found += [process] if title.startswith(tuple(f"ray::{each}" for each in names)) else []
            except psutil.Error:
                pass
        return found

    def kill_node(self, raylet: int) -> None:
        """What a power failure does to a raylet; Ray's other processes of that node are cleared away afterwards."""
        node = self.raylets()[raylet]
        os.kill(raylet, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_all(self) -> None:
        for node in self._cluster.list_all_nodes():
            for processes in node.all_processes.values():
                for found in processes:
                    found.process.kill()
        for node in self._cluster.list_all_nodes()[::-1]:
            self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()


class Job:
    """`penstock train` on the cluster: its process, what was seen of its actors, and when it last got on."""

    def __init__(self, machines: Machines, graph: Path, run: Path, **options: str) -> None:
        self.machines, self.run, self.log = machines, run, run.with_suffix(".log")
        self._graph, self._options = graph, {**OPTIONS, **options}
        self._seen: dict[int, psutil.Process] = {}
        self._progress: tuple[Any, ...] = ()
        self.longest_s = 0.0
        self.starts = 0
        self.start()

    def start(self) -> None:
        words = [sys.executable, "-P", "-m", "penstock", "train", str(self._graph), "--run-dir", str(self.run)]
        words += ["--ray", self.machines.address, "--replicas", "2", "--feeders", "1"]
        words += ["--stage-dir", str(self.run.parent / "stage")]
        for key, value in self._options.items():
            words += ["--set", f"{key}={value}"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(words, cwd=self.run.parent, stdout=log, stderr=log)
        self._seen[self.process.pid] = psutil.Process(self.process.pid)
        self._began_s = self._moved_s = time.monotonic()
        self._silence = Deadline(SILENCE_S)
        self.starts += 1

    @property
    def seconds(self) -> float:
        """Since the (last) start."""
        return time.monotonic() - self._began_s

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def look(self) -> int | None:
        """The exit code, if there is one; fails where nothing has moved for too long."""
        for actor in self.machines.actors():
            self._seen.setdefault(actor.pid, actor)
        saved = tuple(sorted(path.name for path in self.run.glob("checkpoints/step-*")))
        sizes = tuple(path.stat().st_size for path in (self.run / "metrics.jsonl", self.log) if path.exists())
        now_s = time.monotonic()
        self.longest_s = max(self.longest_s, now_s - self._moved_s)
        code = self.process.poll()
        if (saved, sizes) != self._progress or code is not None:
            self._progress, self._moved_s, self._silence = (saved, sizes), now_s, Deadline(SILENCE_S)
        if self._silence.is_over:
            self.fail(f"nothing moved for {now_s - self._moved_s:.0f} s, {SILENCE_S:.0f} s of an idle machine")
        return code

    def step(self) -> int:
        """Of the last line of the metrics, 0 before the first."""
        path = self.run / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def wait(self, until: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for that, or for the end: gives its code."""
        while (code := self.look()) is None and not until():
            time.sleep(POLL_S)
        return code

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def fail(self, why: str) -> None:
        stacks = [path.read_text(errors="replace") for path in self.run.parent.rglob("stacks*.txt")]
        pytest.fail("\n".join([why, self.text()[-6000:], *stacks]))

    def leaves_nobody(self) -> None:
        """All actors and drivers end, soon."""
        deadline = Deadline(SILENCE_S)
        while left := [process for process in self._seen.values() if is_alive(process)] or self.machines.actors():
            if deadline.is_over:
                self.fail(f"{left} are still there")
            time.sleep(POLL_S)
        assert not list((self.run.parent / "stage").glob("feeders/*"))


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    found = Machines()
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("survival") / "graph"
    config = GenerateConfig(num_nodes=6000, num_features=24, avg_degree=8, train=0.2, valid=0.05, test=0.05)
    generate_graph(out, config, host_memory=32 << 20)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Straight:
    """A run that nobody disturbs."""

    seconds: float
    weights: bytes
    metrics: dict[str, Any]


def result_of(job: Job) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((job.run / "result.json").read_text())
    return result


def weights_of(job: Job) -> bytes:
    return (job.run / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def straight(machines: Machines, graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    job = Job(machines, graph, tmp_path_factory.mktemp("straight") / "run")
    assert job.wait() == 0, job.text()
    seconds, result = job.seconds, result_of(job)
    job.leaves_nobody()
    assert result["restarts"] == 0 and len(result["feeders"]) == 1
    tell("nobody", job, 0.0)
    return Straight(seconds=seconds, weights=weights_of(job), metrics=result["metrics"])


def tell(victim: str, job: Job, struck_s: float, step: int = 0) -> None:
    """A line for those who count."""
    result = result_of(job)
    line = {"victim": victim, "struck_s": round(struck_s, 2), "step": step, "restarts": result["restarts"]}
    print(json.dumps({**line, "starts": job.starts, "silence_s": round(job.longest_s, 1)}), flush=True)


def ends_as(job: Job, straight: Straight) -> None:
    """It ended well, with the same weights and records."""
    result = result_of(job)
    assert result["status"] == "ok", job.text()
    assert weights_of(job) == straight.weights, job.text()
    for name in ("train_losses", "valid_accuracy", "test_accuracy", "best_epoch", "steps"):
        assert result["metrics"][name] == straight.metrics[name], name
    job.leaves_nobody()


def kill_actor(name: str, chance: random.Random, job: Job) -> bool:
    found = job.machines.actors(name)
    if found:
        chance.choice(found).kill()
    return bool(found)


def kill_replica(chance: random.Random, job: Job) -> bool:
    return kill_actor("RankActor", chance, job)


def kill_feeder(chance: random.Random, job: Job) -> bool:
    return kill_actor("FeederActor", chance, job)


def kill_raylet(chance: random.Random, job: Job) -> bool:
    """Of a node with a replica; there is another node soon."""
    raylets = sorted({actor.ppid() for actor in job.machines.actors("RankActor")})
    if raylets:
        job.machines.kill_node(chance.choice(raylets))
        job.machines.add_trainer()
    return bool(raylets)


def kill_driver(chance: random.Random, job: Job) -> bool:
    """And run the same command again, at once."""
    job.end()
    job.start()
    return True


VICTIMS = {"replica": kill_replica, "feeder": kill_feeder, "raylet": kill_raylet, "driver": kill_driver}


@pytest.fixture
def launch(machines: Machines, graph: Path, tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Start a run, which is not left behind where the test fails."""
    jobs: list[Job] = []

    def start(**options: str) -> Job:
        jobs.append(Job(machines, graph, tmp_path / "run", **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def strikes(victim: str, chance: random.Random, job: Job, moment_s: float) -> bool:
    return job.seconds > moment_s and VICTIMS[victim](chance, job)


def test_one_run_survives_everybody(launch: Callable[..., Job], straight: Straight) -> None:
    chance, job = random.Random("everybody"), launch()
    for number, (victim, kill) in enumerate(VICTIMS.items()):
        due = (number + 1) * straight.metrics["steps"] // (len(VICTIMS) + 2)
        code = job.wait(lambda: job.step() > due and kill(chance, job))  # noqa: B023  called at once
        assert code is None, f"it ended before the {victim} was killed: {job.text()}"
    due = 5 * straight.metrics["steps"] // 6
    assert job.wait(lambda: job.step() > due) is None, job.text()
    job.process.terminate()
    assert job.wait() == RETRY, job.text()
    job.leaves_nobody()
    job.start()
    assert job.wait() == 0, job.text()
    tell("everybody", job, 0.0)
    ends_as(job, straight)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed(victim: str, number: int, launch: Callable[..., Job], straight: Straight) -> None:
    chance = random.Random(f"{victim} {number}")
    moment_s = chance.uniform(0, straight.seconds)
    job = launch()
    while job.wait(partial(strikes, victim, chance, job, moment_s)) is not None:
        moment_s *= 0.8  # it was faster than the straight one
        shutil.rmtree(job.run)
        job.start()
    step = job.step()
    assert job.wait() == 0, job.text()
    tell(victim, job, moment_s, step)
    ends_as(job, straight)


@only_when_asked  # tests/cluster/test_pipeline.py does it with ranks
def test_a_frozen_replica_is_named_with_stacks(launch: Callable[..., Job], straight: Straight) -> None:
    job = launch(**{"cluster.timeout_s": "10"})
    assert job.wait(lambda: job.step() > 100) is None, job.text()
    frozen = job.machines.actors("RankActor")[0]
    frozen.suspend()
    began = time.monotonic()
    named = rf"replica \d of 0\.\.1 did not move for [^;]* more than timeout_s=10 \(process {frozen.pid} on node "
    assert job.wait(lambda: re.search(named, job.text()) is not None) is None, job.text()
    assert time.monotonic() - began < allowed_s(10 + 15)
    stacks = next(job.run.parent.rglob("stacks.txt")).read_text()
    assert stacks.count("== replica ") == 2
    assert f"process {frozen.pid} on node" in stacks and "stopped by a signal (SIGSTOP)" in stacks
    assert job.wait() == 0, job.text()
    tell("frozen", job, 0.0)
    assert result_of(job)["restarts"] == 1
    ends_as(job, straight)


@only_when_asked
def test_a_driver_that_is_asked_to_stop_goes_on_later(launch: Callable[..., Job], straight: Straight) -> None:
    job = launch()
    assert job.wait(lambda: job.step() > 100) is None, job.text()
    job.process.terminate()
    assert job.wait() == RETRY, job.text()
    step = job.step()
    assert 100 < step < straight.metrics["steps"] and list((job.run / "checkpoints").glob("step-*"))
    job.leaves_nobody()
    job.start()
    assert job.wait() == 0, job.text()
    tell("stop", job, 0.0, step)
    assert result_of(job)["resumed_from"] >= step
    ends_as(job, straight)


@only_when_asked
def test_a_lost_head_node_costs_no_progress(launch: Callable[..., Job], straight: Straight) -> None:
    job = launch()
    assert job.wait(lambda: job.step() > 100) is None, job.text()
    address = job.machines.address
    job.machines.kill_all()
    assert job.wait() == RETRY, job.text()
    assert f"Ray's head at {address} has not answered for 15 s; run the same command again" in job.text()
    job.machines.start()
    job.start()
    assert job.wait() == 0, job.text()
    tell("head", job, 0.0)
    assert result_of(job)["resumed_from"] >= 40
    ends_as(job, straight)
