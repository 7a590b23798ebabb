"""One number everywhere: what a run says on a terminal, in its files and to trackers is the same."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from event_files import events, scalars

from penstock.__main__ import main
from penstock.storage.generate import GenerateConfig, generate_graph

SAMPLED = ["--fanouts", "3,3", "--batch-size", "32", "--host-memory", "8MiB"]
REPLICAS = [*SAMPLED[:-1], "32MiB", "--replicas", "2"]
CHUNKED = ["--mode", "chunked", "--chunks", "4", "--layers", "2"]
NUMBER = r"([0-9.,]+)"


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("numbers") / "graph"
    config = GenerateConfig(num_nodes=600, num_features=8, train=0.3, valid=0.1, test=0.1)
    generate_graph(out, config, host_memory=64 << 20)
    return out


class Told:
    """What a run said: lines of stderr and stdout, records, and what is in result.json."""

    def __init__(self, graph: Path, run: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        common = ["--hidden", "8", "--epochs", "3", "--threads", "1"]
        with pytest.raises(SystemExit) as ended:
            main(["train", str(graph), "--run-dir", str(run), *common, *words])
        said = capsys.readouterr()
        assert ended.value.code == 0, said.err
        self.run, self.err, self.out = run, said.err.splitlines(), said.out.splitlines()
        self.records: list[dict[str, Any]] = [
            json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        self.epochs = [record for record in self.records if "train_loss" in record]
        self.result: dict[str, Any] = json.loads((run / "result.json").read_text())


@pytest.mark.parametrize("words", [SAMPLED, CHUNKED])
def test_a_rate_is_one_number_on_the_terminal_and_in_all_files(
    words: list[str], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed: pip install tensorboardX")
    told = Told(graph, tmp_path / "run", [*words, "--track", "tensorboard"], capsys)
    rates = [record["items_per_s"] for record in told.epochs]
    shown = [re.search(rf"^epoch {n} of 3 .* {NUMBER} items/s", "\n".join(told.err), re.M) for n in (1, 2, 3)]
    assert [found and found[1] for found in shown] == [f"{rate:,.4g}" for rate in rates]
    assert [entry["items_per_s"] for entry in told.result["epochs"]] == rates
    curve = scalars(events(tmp_path / "run" / "tensorboard"))["items_per_s"]
    assert curve[-1][0] == told.epochs[-1]["step"] and curve[-1][1] == pytest.approx(rates[-1], rel=1e-5)
    assert {step for step, _ in curve} == {record["step"] for record in told.records}
    items = told.epochs[0]["step"] if words is SAMPLED else 4
    mean = 3 * items / sum(items / rate for rate in rates)
    assert told.result["throughput"]["items_per_s"] == pytest.approx(mean)
    assert f"{mean:,.4g} items/s" in " ".join(told.out)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(SAMPLED, id="packs"),
        pytest.param([*SAMPLED[:-2], "--in-memory"], id="in memory", marks=pytest.mark.slow),
        pytest.param(REPLICAS, id="replicas", marks=pytest.mark.slow),
        pytest.param(CHUNKED, id="chunked", marks=pytest.mark.slow),
    ],
)
def test_every_second_has_a_name(
    words: list[str], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = Told(graph, tmp_path / "run", words, capsys).result
    times: dict[str, float] = result["timings"]

    def sum_of(*names: str) -> float:
        return sum((times.get(f"{name}_s", 0.0) for name in names), 0.0)

    assert all(value >= 0 for value in times.values())
    assert times["total_s"] == pytest.approx(sum_of("prepare", "train", "test", "save"))
    assert times["prepare_s"] == pytest.approx(sum_of("sample", "plan", "pack", "cut", "setup"))
    parts = ("start", "compute", "stall", "reduce", "evaluate", "checkpoint", "record")
    assert times["train_s"] == pytest.approx(sum_of(*parts))
    assert times["evaluate_s"] > 0 and times["compute_s"] > 0 and times["test_s"] > 0
    assert result["stalls"]["stall_s"] == times["stall_s"]
    steps = {"sample_s", "plan_s", "pack_s"} if words is not CHUNKED else {"cut_s"}
    assert steps <= set(times)
