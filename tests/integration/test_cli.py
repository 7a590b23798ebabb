"""The command line as a pipeline sees it: exit codes, messages, files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from penstock.__main__ import main
from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph

SHAPE = ["--fanouts", "4,4", "--batch-size", "64", "--hidden", "16", "--quiet"]
SETTINGS = [*SHAPE, "--host-memory", "24MiB", "--epochs", "3"]


def penstock(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "penstock", *map(str, words)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", **env}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "graph"
    config = GenerateConfig(num_nodes=8000, num_features=32, avg_degree=8, train=0.1, valid=0.02, test=0.05)
    generate_graph(out, config, host_memory=32 * MIB)
    (out.parent / "in").mkdir()
    np.save(out.parent / "in" / "features.npy", np.zeros((3, 2), np.float32))
    np.save(out.parent / "in" / "edge_index.npy", np.zeros((2, 1), np.int64))
    return out


@pytest.fixture(scope="module")
def trained(graph: Path) -> Path:
    run = graph.parent / "run"
    done = penstock("train", graph, "--run-dir", run, *SETTINGS)
    assert done.returncode == 0, done.stderr
    return run


def test_train_leaves_its_files(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    assert result["schema"] == 1 and result["status"] == "ok" and result["error"] is None
    assert 0.2 < result["metrics"]["test_accuracy"] <= 1
    assert result["peak_rss_bytes"] > 0 and result["bytes_read"] > 0
    assert set(result["stalls"]) == {"stall_s", "read_s", "assemble_s"}
    assert sum(result["hit_rates"].values()) == pytest.approx(1)
    assert result["plan"]["host_slots"] > 0
    for path in result["artefacts"].values():
        assert Path(path).exists()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if "train_loss" in line] == [1, 2, 3]
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((trained / "config.yaml").read_text())["train"]["epochs"] == 3


def test_a_second_run_is_already_done(graph: Path, trained: Path, tmp_path: Path) -> None:
    before = (trained / "result.json").read_bytes()
    done = penstock("train", graph, "--run-dir", trained, *SETTINGS, "--result-json", tmp_path / "deep" / "copy.json")
    assert done.returncode == 0, done.stderr
    assert (trained / "result.json").read_bytes() == before == (tmp_path / "deep" / "copy.json").read_bytes()


@pytest.mark.slow
def test_without_resume_it_trains_again_on_the_same_packs_to_the_same_weights(graph: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["train", graph, "--run-dir", tmp_path / "run", *SETTINGS]
    assert penstock(*words).returncode == 0
    weights, result = tmp_path / "run" / "model" / "model.safetensors", tmp_path / "run" / "result.json"
    packs = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "train").rglob("*.pack")}
    before, finished = weights.read_bytes(), result.stat().st_mtime_ns
    assert penstock(*words, "--resume=false").returncode == 0
    assert result.stat().st_mtime_ns > finished and weights.read_bytes() == before
    assert packs and {path: path.stat().st_mtime_ns for path in packs} == packs


@pytest.mark.slow
def test_all_neighbours_are_asked_for_as_the_help_says(graph: Path, tmp_path: Path) -> None:
    words = ["--fanouts", "-1,-1", "--batch-size", "64", "--hidden", "16", "--host-memory", "64MiB", "--quiet"]
    done = penstock("plan", graph, "--run-dir", tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["sampler"]["fanouts"] == [-1, -1]


@pytest.mark.slow
@pytest.mark.parametrize("num_nodes", [50_000, 70_000, 100_000, 150_000])
def test_small_quick_starts(tmp_path: Path, num_nodes: int) -> None:
    done = penstock("quickstart", tmp_path, "--num-nodes", str(num_nodes), "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text())["metrics"]["losses_equal"]


@pytest.mark.slow
def test_a_quick_start_that_does_not_fit_exits_so_and_takes_its_remedy(tmp_path: Path) -> None:
    words: list[str | Path] = ["quickstart", tmp_path, "--num-nodes", "50000", "--quiet"]
    done = penstock(*words, "--host-memory", "1MiB")
    found = re.search(r"use --host-memory (\d+) or more", done.stderr)
    assert done.returncode == 4 and found is not None, done.stderr
    done = penstock(*words, "--host-memory", found[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_a_verb_without_a_traceback() -> None:
    """As `| head` does. The table is larger than a pipe and than what is read of it."""
    command = [sys.executable, "-m", "penstock", "config"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.slow
def test_another_configuration_is_refused_by_name(graph: Path, trained: Path) -> None:
    done = penstock("train", graph, "--run-dir", trained, *SETTINGS, "--lr", "0.5")
    assert done.returncode == 2
    assert "train.lr" in done.stderr and "--force" in done.stderr


@pytest.mark.slow
def test_the_resolved_configuration_is_accepted(trained: Path, tmp_path: Path) -> None:
    done = penstock("plan", "-c", trained / "config.yaml", "--run-dir", tmp_path / "again", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["host_slots"] == json.loads((trained / "result.json").read_text())["plan"]["host_slots"]
    assert not list((tmp_path / "again").rglob("*.pack")), "plan must not pack"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train", "--host-memry", "1GiB"], 2, "--host-memory"),
        (["train", "{graph}", "--run-dir", "{tmp}/r", "--set", "train.epoch=3"], 2, "'train.epochs'"),
        (["train", "{graph}", "--run-dir", "{tmp}/r", "--set", "modle.kind=gcn"], 2, "'model'"),
        (["train", "{graph}"], 2, "run_dir is missing"),
        (["plan", "{graph}", "--run-dir", "{tmp}/r", "--result-json", "{tmp}/x"], 2, "--result-json"),
        (["pack", "{graph}", "--run-dir", "{tmp}/r", "--result-json", "{tmp}/x"], 2, "--result-json"),
        (["train", "{graph}", "--run-dir", "{tmp}/r", "--host-memory", "lots"], 2, "'lots' is not a size"),
        (["train", "{tmp}/nothing", "--run-dir", "{tmp}/r"], 3, "does not exist"),
        (["train", "{graph}", "--run-dir", "{graph}"], 2, "is the dataset"),
        (["train", "{graph}", "--run-dir", "{graph}/manifest.json"], 2, "is a file"),
        (["ingest", "{graph}/../in", "{graph}/manifest.json"], 2, "is a file"),
        (["inspect", "{tmp}"], 3, "no graph store"),
        (["infer", "{tmp}", "{tmp}/x.parquet"], 3, "no config.yaml: it is no run"),
        (["bench", "sample", "--scale", "0.0019"], 2, "--scale 0.0019 must be from 0.002"),
        (["quickstart", "{tmp}/q", "--num-nodes", "49999"], 2, "use 50000 or more"),
        (["train", "{graph}", "--run-dir", "{tmp}/r", "--fanouts", "-x"], 2, "write integers"),
    ],
)
def test_mistakes_have_an_exit_code_and_a_remedy(
    graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    message: str,
) -> None:
    """In this process: most of the time of a command that fails goes into imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command appends to it
    with pytest.raises(SystemExit) as ended:
        main([word.format(graph=graph, tmp=tmp_path) for word in words])
    said = "".join(capsys.readouterr())
    assert ended.value.code == code, said
    assert message in " ".join(said.split())
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--host-memory", "--disk"])
def test_a_budget_that_is_too_small_names_one_that_works(graph: Path, tmp_path: Path, flag: str) -> None:
    other = ["--disk", "1GiB"] if flag == "--host-memory" else ["--host-memory", "24MiB"]
    words: list[str | Path] = ["plan", graph, "--run-dir", tmp_path / "run", *SHAPE, "--epochs", "1", *other, flag]
    refused = penstock(*words, "30KiB")
    assert refused.returncode == 4, refused.stderr
    found = re.search(rf"use {flag} (\d+) or more", refused.stderr)
    assert found is not None, refused.stderr
    done = penstock(*words, found[1])
    assert done.returncode == 0, done.stderr


def test_infer_writes_every_node_under_its_id(graph: Path, trained: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "nodes.parquet"
    done = penstock("infer", trained, out, "--quiet", "--host-memory", "64MiB")
    assert done.returncode == 0, done.stderr
    table = pq.read_table(out)
    assert table.column("id").to_pylist() == list(range(8000))
    assert {"embedding", "logits", "prediction"} <= set(table.column_names)


@pytest.mark.slow
def test_inspect_knows_graphs_packs_and_runs(graph: Path, trained: Path) -> None:
    kinds = []
    for path in (graph, trained / "train" / "packs", trained):
        done = penstock("inspect", path, "--validate", "--json")
        assert done.returncode == 0, done.stderr
        kinds.append(json.loads(done.stdout)["kind"])
    assert kinds == ["graph store", "pack set", "run"]


def test_inspect_finds_a_flipped_byte(graph: Path, trained: Path, tmp_path: Path) -> None:
    packs = tmp_path / "packs"
    subprocess.run(["cp", "-r", trained / "train" / "packs", packs], check=True)
    pack = next(packs.glob("*.pack"))
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    done = penstock("inspect", packs, "--validate")
    assert done.returncode == 3 and "checksum" in done.stderr


@pytest.mark.slow
def test_sigterm_checkpoints_and_asks_to_be_run_again(graph: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [
        "train",
        graph,
        "--run-dir",
        tmp_path / "run",
        *SHAPE,
        "--host-memory",
        "24MiB",
        "--epochs",
        "30",
    ]
    command = [sys.executable, "-m", "penstock", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "stopped"
    resumed = penstock(*words)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["resumed_from"] > 0
    straight = tmp_path / "straight"
    words[words.index(tmp_path / "run")] = straight
    assert penstock(*words).returncode == 0
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (tmp_path / "run", straight)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_run_folder_in_use_is_refused(graph: Path, tmp_path: Path) -> None:
    words = [
        "train",
        str(graph),
        "--run-dir",
        str(tmp_path / "run"),
        *SHAPE,
        "--host-memory",
        "24MiB",
        "--epochs",
        "400",
    ]
    process = subprocess.Popen([sys.executable, "-m", "penstock", *words])
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "config.yaml").is_file():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done = penstock(*words)
        assert done.returncode == 75 and f"process {process.pid}" in done.stderr
    finally:
        process.kill()
        process.wait()


def test_doctor_answers(tmp_path: Path) -> None:
    done = penstock("doctor", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    checks = {line["check"] for line in json.loads(done.stdout)}
    assert {"O_DIRECT", "sequential read", "memory free", "cores for this process", "torch"} <= checks


@pytest.mark.slow
def test_sigterm_while_sampling_or_packing_asks_to_be_run_again(graph: Path, tmp_path: Path) -> None:
    words: list[str | Path] = ["pack", graph, "--run-dir", tmp_path / "run", *SHAPE[:-1]]
    words += ["--set", "sampled_epochs=12", "--epochs", "12"]
    command = [sys.executable, "-m", "penstock", *map(str, words)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("sample"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 75, rest
    assert "run the same command again" in rest
    done = penstock(*words)
    assert done.returncode == 0, done.stderr
