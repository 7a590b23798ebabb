import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from penstock.benchmarks.memory import measure_run, tree_rss_bytes
from penstock.config import RunConfig, load_config
from penstock.engine.activations import step_bytes
from penstock.engine.models import ModelConfig, build_model
from penstock.host_budget import choose_host_bytes, fixed_bytes
from penstock.process_memory import PROCESS, TOPOLOGY, Forecast, Phase
from penstock.run import open_run
from penstock.storage.errors import DoesNotFit
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    folder = tmp_path_factory.mktemp("memory") / "graph"
    return generate_graph(folder, GenerateConfig(num_nodes=20_000, num_features=1024), host_memory=256 * MIB)


def _forecast(host: int) -> Forecast:
    prepare = Phase(
        name="prepare", parts={PROCESS: 400 * MIB, TOPOLOGY: GIB, "sampling": host // 2}, budgeted=host // 2
    )
    train = Phase(name="train", parts={PROCESS: 500 * MIB, "host tier": host, "activations": 100 * MIB}, budgeted=host)
    return Forecast(phases=(prepare, train))


def test_what_cannot_fit_names_a_budget_that_does() -> None:
    with pytest.raises(DoesNotFit, match=r"needs 1.37 GiB in its step 'train' with --host-memory 800 MiB") as refused:
        _forecast(800 * MIB).check(800 * MIB, GIB)
    number = int(str(refused.value).split("use --host-memory ")[1].split()[0])
    assert number == 424 * MIB
    _forecast(number).check(number, GIB)
    container = int(str(refused.value).split("give the container ")[1].split()[0])
    _forecast(800 * MIB).check(800 * MIB, container)


def test_what_no_budget_mends_asks_for_a_larger_container() -> None:
    with pytest.raises(DoesNotFit, match="give the container") as refused:
        _forecast(100 * MIB).check(100 * MIB, 300 * MIB)
    assert "use --host-memory" not in str(refused.value)


def test_mapped_topology_counts_in_the_peak_and_does_not_refuse() -> None:
    forecast = _forecast(100 * MIB)
    assert forecast.peak.name == "prepare" and forecast.num_bytes == 400 * MIB + GIB + 50 * MIB
    forecast.check(100 * MIB, 700 * MIB)


def _config(graph: GraphStore, host_memory: int) -> RunConfig:
    given = {"dataset": str(graph.path), "run_dir": "unused", "budgets.host_memory": host_memory}
    return load_config(None, ["sampler.batch_size=16", "model.hidden=8"], given)


def test_a_given_budget_that_leaves_no_room_is_refused_before_anything_is_sampled(graph: GraphStore) -> None:
    process = 300 * MIB
    computing = fixed_bytes(_config(graph, MIB), graph, process) - process
    assert computing > 0
    given = (computing + 24 * MIB) * 4 // 3  # a quarter is kept for evaluation, and need not be used
    assert given < graph.feature_bytes
    limit = process + computing + 20 * MIB
    with pytest.raises(DoesNotFit, match="does not fit this container or machine") as refused:
        choose_host_bytes(_config(graph, given), graph, process, limit)
    number = int(str(refused.value).split("use --host-memory ")[1].split()[0])
    assert number == 20 * MIB
    assert choose_host_bytes(_config(graph, number), graph, process, limit) == number
    container = int(str(refused.value).split("or give it ")[1].split()[0])
    assert choose_host_bytes(_config(graph, given), graph, process, container) == given


def test_a_container_that_the_process_alone_fills_is_refused(graph: GraphStore) -> None:
    with pytest.raises(DoesNotFit, match="give it [0-9]+ bytes or more, or use a smaller batch") as refused:
        choose_host_bytes(_config(graph, 32 * MIB), graph, 300 * MIB, 310 * MIB)
    container = int(str(refused.value).split("give it ")[1].split()[0])
    assert choose_host_bytes(_config(graph, 32 * MIB), graph, 300 * MIB, container) == 32 * MIB


def test_a_container_of_the_predicted_size_is_not_refused(graph: GraphStore) -> None:
    """A step may need far less than fanouts allow, so only the plan refuses what is not certain."""
    given = 40 * MIB
    assert choose_host_bytes(_config(graph, given), graph, 300 * MIB, 300 * MIB + given * 3 // 4) == given


def test_a_budget_that_the_features_cannot_fill_is_no_reason_to_refuse(graph: GraphStore) -> None:
    assert choose_host_bytes(_config(graph, 2 * GIB), graph, 300 * MIB, GIB) == 2 * GIB


def test_what_no_memory_can_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    graph = generate_graph(tmp_path / "graph", GenerateConfig(num_nodes=2000, num_features=16), host_memory=64 * MIB)
    asked = ["model.kind=gat", "sampler.replace=true", "sampler.batch_size=2000", "sampler.fanouts=[10000000,10000000]"]
    config = load_config(None, asked, {"dataset": str(graph.path), "run_dir": str(tmp_path / "run")})
    with pytest.raises(DoesNotFit, match="give it [0-9]+ bytes or more, or use a smaller batch size"), open_run(config):
        pass
    assert not (tmp_path / "run").exists()


_GROWN = "grown = b'1' * (256 << 20); "
_ASLEEP = "print(1, flush=True); sys.stdin.read()"


def _tree_bytes(code: str) -> tuple[int, int]:
    """What is measured of a process that runs `code`, and of it alone."""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        found = psutil.Process(process.pid)
        sizes = tree_rss_bytes(found), int(found.memory_info().rss)
        process.stdin.close()
    return sizes


def test_a_child_that_runs_no_program_of_its_own_is_not_measured_twice() -> None:
    whole, alone = _tree_bytes(f"import os, sys; {_GROWN}pid = os.fork(); pid or sys.stdin.read(); pid and {_ASLEEP}")
    assert alone > 256 * MIB and whole < alone + 16 * MIB


def test_a_child_with_a_program_of_its_own_is_measured() -> None:
    child = f"import sys; {_GROWN}{_ASLEEP}"
    whole, alone = _tree_bytes(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    assert whole > alone + 256 * MIB


def test_activations_scale_to_large_items_and_leave_the_model_alone() -> None:
    model = build_model(ModelConfig(kind="sage", num_layers=2, hidden=128), 64, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options: dict[str, Any] = {"multi_label": False, "train": True}
    small = step_bytes(model, [(8000, 1000, 9000), (1000, 100, 1000)], 64, 5, **options)
    large = step_bytes(model, [(80_000, 10_000, 90_000), (10_000, 1000, 10_000)], 64, 5, **options)
    assert 9 * small < large < 11 * small
    # the output of the first layer alone, and its gradient, must be held
    assert large > 2 * 4 * 10_000 * 128
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_stays_below_what_plan_predicts(graph: GraphStore, tmp_path: Path) -> None:
    arguments = [str(graph.path), "--epochs", "1"]
    measured, result = measure_run(arguments, tmp_path / "run")
    plan = json.loads((tmp_path / "run" / "train" / "plan.json").read_text())
    assert result["memory"] == plan["memory"]
    assert sum(plan["memory"]["components"].values()) == plan["memory"]["predicted_peak_bytes"]
    assert plan["memory"]["predicted_peak_bytes"] >= measured >= result["peak_rss_bytes"] > 100 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--pack-mode", "rolling"],
        ["--set", "evaluate.mode=exact"],
        ["--mode", "chunked", "--layers", "2", "--chunks", "4"],
        ["--mode", "chunked", "--layers", "3", "--chunks", "8", "--stages", "2", "--set", "chunked.recompute=always"],
    ],
)
def test_other_runs_stay_below_it_too(graph: GraphStore, tmp_path: Path, options: list[str]) -> None:
    arguments = [str(graph.path), "--epochs", "1", "--host-memory", "1GiB", *options]
    measured, result = measure_run(arguments, tmp_path / "run")
    assert 0.6 <= measured / result["memory"]["predicted_peak_bytes"] <= 1


@pytest.mark.slow
def test_full_graph_training_is_within_a_tenth(tmp_path: Path) -> None:
    graph = generate_graph(tmp_path / "graph", GenerateConfig(num_nodes=16_000, num_features=64, avg_degree=16))
    shape = ["--mode", "chunked", "--layers", "3", "--hidden", "64", "--chunks", "8", "--stages", "2", "--epochs", "2"]
    measured, result = measure_run([str(graph.path), *shape, "--host-memory", "1GiB"], tmp_path / "run")
    assert 0.9 <= measured / result["memory"]["predicted_peak_bytes"] <= 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--set", "feed=memory"], ["--replicas", "2"]])
def test_runs_without_a_plan_of_their_own_are_predicted(graph: GraphStore, tmp_path: Path, options: list[str]) -> None:
    measured, result = measure_run(
        [str(graph.path), "--epochs", "1", "--host-memory", "640MiB", *options], tmp_path / "run"
    )
    assert 0.7 <= measured / result["memory"]["predicted_peak_bytes"] <= 1


def _infer(run_dir: Path, out: Path, host_memory: int) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "penstock", "infer", str(run_dir), str(out), "--host-memory", str(host_memory)]
    return subprocess.run([*command, "--quiet"], capture_output=True, text=True)


@pytest.mark.slow
def test_infer_says_what_it_takes_and_stays_below(graph: GraphStore, tmp_path: Path) -> None:
    _, result = measure_run([str(graph.path), "--epochs", "1", "--host-memory", "640MiB"], tmp_path / "run")
    assert result["status"] == "ok"
    found = json.loads(_infer(tmp_path / "run", tmp_path / "out.parquet", 128 * MIB).stdout)
    assert 0.7 <= found["peak_rss_bytes"] / found["predicted_peak_bytes"] <= 1
    refused = _infer(tmp_path / "run", tmp_path / "again.parquet", MIB)
    assert refused.returncode == 4 and "use --host-memory" in refused.stderr
    assert not (tmp_path / "again.parquet").exists()


@pytest.mark.slow
def test_plan_prints_the_number(graph: GraphStore, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penstock", "plan", str(graph.path), "--run-dir", str(tmp_path / "run")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    number = json.loads((tmp_path / "run" / "train" / "plan.json").read_text())["memory"]["predicted_peak_bytes"]
    assert f"give the container {-(-number // MIB)} MiB" in printed
    assert "interpreter and libraries" in printed
