"""Kill the whole job with SIGKILL, again and again, and fill its disk: what it ends with does not change."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph

FolderBytes = Callable[[Path], dict[str, bytes]]
SETTINGS = ["--host-memory", "24MiB", "--fanouts", "4,4", "--batch-size", "64", "--hidden", "16", "--quiet"]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "penstock", *map(str, words)]


def train(graph: Path, run: Path, *words: str) -> list[str]:
    every_item = ["--set", "train.checkpoint_items=7", "--epochs", "6"]
    return command("train", graph, "--run-dir", run, *SETTINGS, *every_item, *words)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kill") / "graph"
    config = GenerateConfig(num_nodes=20_000, num_features=64, avg_degree=8, train=0.1, valid=0.01, test=0.01)
    generate_graph(out, config, host_memory=32 * MIB)
    return out


def run_killed(words: list[str], kills: int, seed: int, longest_s: float) -> int:
    """Run a command to its end, killing its process group at random moments; returns how often it was killed."""
    rng, killed = random.Random(seed), 0
    for _ in range(kills + 1):
        process = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True)
        try:
            timeout = rng.uniform(1.0, longest_s) if killed < kills else 240
            _, stderr = process.communicate(timeout=timeout)
            assert process.returncode == 0, stderr
            return killed
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed += 1
    raise AssertionError("the command did not end within 240 s")


def run_until(words: list[str], folder: Path, changes: int) -> tuple[bool, int]:
    """Run a command, and kill its process group once it has changed so many files of a folder; whether it ended by
    itself, and the changes that were seen."""
    seen: set[tuple[str, int]] = set()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, start_new_session=True, stdout=said, stderr=said)
        before = _files(folder)
        while process.poll() is None:
            seen |= _files(folder) - before
            if len(seen) >= changes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return False, len(seen)
            time.sleep(0.002)
        said.seek(0)
        assert process.returncode == 0, said.read().decode()
    return True, len(seen)


def _files(folder: Path) -> set[tuple[str, int]]:
    found = set()
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found.add((f"{place}/{name}", os.stat(f"{place}/{name}").st_mtime_ns))
    return found


@pytest.mark.slow
def test_ten_kills_of_the_main_job_leave_the_same_packs_and_weights(
    graph: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    began = time.monotonic()
    subprocess.run(train(graph, straight), check=True, timeout=240)
    took = time.monotonic() - began
    assert run_killed(train(graph, killed), kills=10, seed=3, longest_s=took / 2) >= 3, "too few kills came in time"
    for part in ("train/packs", "valid/packs", "test/packs"):
        packs = folder_bytes(killed / part)
        assert packs and packs == folder_bytes(straight / part)
    assert folder_bytes(killed / "model") == folder_bytes(straight / "model")
    losses = [json.loads((run / "result.json").read_text())["metrics"]["train_losses"] for run in (straight, killed)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_kills_of_a_rolling_run_leave_the_weights_of_training_in_memory(graph: Path, tmp_path: Path) -> None:
    killed, memory = tmp_path / "killed", tmp_path / "memory"
    subprocess.run(train(graph, memory, "--in-memory", "--set", "sampled_epochs=6"), check=True, timeout=240)
    rolling = train(graph, killed, "--pack-mode", "rolling", "--disk", "60MiB")
    rolling[rolling.index("24MiB")] = "200MiB"
    assert run_killed(rolling, kills=3, seed=5, longest_s=6) >= 1
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (killed, memory)]
    assert weights[0] == weights[1]


SHAPE = [word for word in SETTINGS if word not in ("--host-memory", "24MiB")]
CHUNKED = ["--mode", "chunked", "--model", "gcn", "--chunks", "6", "--hidden", "16", "--layers", "2", "--quiet"]
SCENES: dict[str, tuple[list[str], list[list[str]]]] = {
    # one epoch, whose windows are sampled, planned and packed again wherever the budgets are others
    "sampling": (
        [*SHAPE, "--set", "sampler.window_items=4", "--set", "plan.mode=reuse", "--epochs", "1"],
        [
            ["--host-memory", host, "--disk", disk]
            for host in ("14MiB", "24MiB", "200MiB")
            for disk in ("80MiB", "1GiB")
        ],
    ),
    "rolling": (
        [*SHAPE, "--pack-mode", "rolling", "--set", "train.checkpoint_items=7", "--epochs", "4"],
        [
            ["--host-memory", host, "--disk", disk]
            for host in ("150MiB", "200MiB", "400MiB")
            for disk in ("60MiB", "1GiB")
        ],
    ),
    "full graph": (
        [*CHUNKED, "--set", "chunked.partition=ldg", "--set", "train.checkpoint_items=1", "--epochs", "12"],
        [
            ["--host-memory", host, "--disk", disk]
            for host in ("40MiB", "60MiB", "400MiB")
            for disk in ("200MiB", "1GiB")
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
def test_kills_with_other_budgets_after_each_leave_the_same_weights(graph: Path, tmp_path: Path, scene: str) -> None:
    """What a kill interrupts is chosen by the files that were written, not by the clock."""
    (words, budgets), rng = SCENES[scene], random.Random(7)
    straight, killed = (
        command("train", graph, "--run-dir", tmp_path / name, *words) for name in ("straight", "killed")
    )
    _, changes = run_until([*straight, *budgets[-1]], tmp_path / "straight", 1 << 30)
    kills = 0
    for _ in range(4):
        has_ended, _ = run_until([*killed, *rng.choice(budgets)], tmp_path / "killed", rng.randint(2, changes // 2))
        kills += not has_ended
    assert kills >= 2 and run_until([*killed, *rng.choice(budgets)], tmp_path / "killed", 1 << 30)[0]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "killed")]
    assert weights[0] == weights[1]


@pytest.fixture
def disk_of_64_mib(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Take all but `leave_bytes` of a small disk."""
    stat = os.statvfs(folder)
    path = folder / "ballast"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - leave_bytes)
    return path


def ended(words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)


def as_planned(files: dict[str, bytes]) -> dict[str, object]:
    """Files of a run without its lock; plans without their forecast, which begins with the size of the process."""
    plans = {name: json.loads(data) for name, data in files.items() if name.endswith("/plan.json")}
    kept = {name: {key: plan[key] for key in plan if key not in ("memory", "seal")} for name, plan in plans.items()}
    found: dict[str, object] = {name: data for name, data in files.items() if name != ".lock"}
    return found | kept


@pytest.mark.slow
def test_a_disk_that_fills_while_packing_is_exit_code_4_and_can_be_continued(
    graph: Path, disk_of_64_mib: Path, tmp_path: Path, folder_bytes: FolderBytes
) -> None:
    run = disk_of_64_mib / "run"
    assert ended(command("plan", graph, "--run-dir", run, *SETTINGS, "--epochs", "1")).returncode == 0
    before = as_planned(folder_bytes(run))
    ballast = fill(disk_of_64_mib, 300_000)
    done = ended(command("pack", graph, "--run-dir", run, *SETTINGS, "--epochs", "1"))
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr and ("full" in done.stderr or "free" in done.stderr)
    assert {name: found for name, found in as_planned(folder_bytes(run)).items() if name in before} == before
    ballast.unlink()
    done = ended(command("pack", graph, "--run-dir", run, *SETTINGS, "--epochs", "1"))
    assert done.returncode == 0, done.stderr
    assert (run / "train" / "packs" / "manifest.json").is_file()


@pytest.mark.slow
def test_a_disk_that_fills_while_training_is_exit_code_4_and_keeps_the_checkpoint(
    graph: Path, disk_of_64_mib: Path, tmp_path: Path
) -> None:
    run, straight = disk_of_64_mib / "run", tmp_path / "straight"
    words = train(graph, run, "--disk", "40MiB", "--set", "sampled_epochs=1")
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            deadline = time.monotonic() + 120
            while not list((run / "checkpoints").glob("step-*/state.json")) and process.poll() is None:
                assert time.monotonic() < deadline, "no checkpoint came"
                time.sleep(0.01)
            # stopped, so that it takes no byte between our look at the free space and our taking of it
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            ballast = fill(disk_of_64_mib, 8_000)
            process.send_signal(signal.SIGCONT)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 4, stderr
    assert "full" in stderr and "Traceback" not in stderr
    assert list((run / "checkpoints").glob("step-*/state.json")), "the earlier checkpoint is gone"
    ballast.unlink()
    done = ended(words)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["resumed_from"] > 0
    subprocess.run(train(graph, straight, "--set", "sampled_epochs=1"), check=True, timeout=240)
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (run, straight)]
    assert weights[0] == weights[1]
