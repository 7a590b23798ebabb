import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from penstock import exit_codes
from penstock.cluster.jobs import Job
from penstock.config import RunConfig, load_config
from penstock.launch_verbs import is_done, job_exit_code, submission_id
from penstock.portable import portable_config, spans_ray
from penstock.report import write_result
from penstock.storage.errors import DataError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import write_json
from penstock.training import train

OTHERS: tuple[dict[str, Any], ...] = ({"run_dir": "s"}, {"train__lr": 0.5}, {"dataset": "h"}, {"experiment": "e"})


def config(**flags: Any) -> RunConfig:
    return load_config(flags={"dataset": "g", "run_dir": "r", **{k.replace("__", "."): v for k, v in flags.items()}})


def job(**changes: Any) -> Job:
    values: dict[str, Any] = {"id": "p", "status": "FAILED", "message": "", "exit_code": None, "started_at": 0.0}
    return Job(**{**values, **changes})


def test_ids_tell_runs_apart_and_nothing_else() -> None:
    base = submission_id(config())
    assert base == submission_id(config(cluster__replicas=1, train__log_every=3))
    others = [submission_id(config(**flags)) for flags in OTHERS]
    assert len({base, *others}) == 1 + len(OTHERS)
    uri = {"run_dir": "s3://b/run", "dataset": "s3://b/g"}
    assert submission_id(config(**uri)) == submission_id(config(**uri, remote__stage_dir="/elsewhere"))


def test_a_portable_configuration_is_the_same_run_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(run_dir="s3://b/run", remote__stage_dir="stage", train__lr=0.25)
    for compact in (False, True):
        value = portable_config(given, compact=compact)
        assert value["run_dir"] == "s3://b/run"
        assert value["dataset"] == str(Path("g").absolute())
        assert value["remote"] == {"stage_dir": str(Path("stage").absolute())}
        monkeypatch.chdir(tmp_path)
        assert RunConfig.model_validate(value).remote.run_dir == "s3://b/run"
        monkeypatch.undo()
    assert "train" in portable_config(given, compact=True) and "evaluate" not in portable_config(given, compact=True)


@pytest.mark.parametrize(
    ("flags", "spans"),
    [
        ({}, False),
        ({"cluster__replicas": 2}, True),
        ({"cluster__feeders": 1}, True),
        ({"cluster__address": "auto"}, True),
        ({"mode": "chunked"}, False),
        ({"mode": "chunked", "chunked__backend": "ray"}, True),
    ],
)
def test_ray_places_what_is_wide(flags: dict[str, Any], spans: bool) -> None:
    assert spans_ray(config(**flags)) is spans


def test_exit_codes_come_from_the_driver_else_from_the_result(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    assert job_exit_code(job(status="SUCCEEDED"), str(result)) == 0
    assert job_exit_code(job(exit_code=4), str(result)) == 4
    assert job_exit_code(job(exit_code=0), str(result)) == 1  # failed, whatever the driver thought
    assert job_exit_code(job(), str(result)) == 1
    assert job_exit_code(job(), "s3-of-nobody://bucket/run/result.json") == 1
    write_result(result, status="failed", config=None, metrics={}, error=DataError("no graph"))
    assert job_exit_code(job(), str(result)) == 3
    assert job_exit_code(job(), result.as_uri()) == 3
    assert job_exit_code(job(exit_code=137), str(result)) == 137
    assert job_exit_code(job(started_at=time.time() + 60), str(result)) == 1  # an earlier attempt's result
    write_result(result, status="stopped", config=None, metrics={})
    assert job_exit_code(job(status="STOPPED"), str(result)) == 75
    write_json(result, {"status": "failed", "finished_at": "soon"})
    assert job_exit_code(job(started_at=1e9), str(result)) == 1


def test_done_is_a_folder_with_the_result_of_this_graph_and_configuration(
    tiny_graph: GraphStore, tmp_path: Path
) -> None:
    place = tmp_path / "graph"
    shutil.copytree(tiny_graph.path, place)
    flags: dict[str, Any] = {"dataset": place, "run_dir": tmp_path / "run", "train.epochs": 1, "train.threads": 1}
    flags |= {"sampler.fanouts": (2,), "sampler.batch_size": 64, "budgets.host_memory": "24MiB"}

    def done(**changes: Any) -> bool:
        return is_done(load_config(flags=flags | changes))

    assert not done()
    train(load_config(flags=flags))
    assert done() and done(**{"budgets.host_memory": "48MiB", "run_dir": (tmp_path / "run").as_uri()})
    assert not done(**{"train.epochs": 2}) and not done(**{"train.lr": 0.5})
    other = GenerateConfig(num_nodes=tiny_graph.num_nodes, num_features=tiny_graph.meta.num_features, avg_degree=3)
    shutil.rmtree(place)
    assert not done()
    generate_graph(place, other, host_memory=32 << 20)
    assert not done(), "another graph under the same path"
    shutil.rmtree(place)
    shutil.copytree(tiny_graph.path, place)
    assert done()
    shutil.rmtree(tmp_path / "run")
    assert not done()


def penstock(*arguments: str, before: str = "pass") -> "subprocess.CompletedProcess[str]":
    code = f"import sys; {before}; from penstock.__main__ import main; main(sys.argv[1:])"
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_without_ray_the_extra_is_named() -> None:
    ended = penstock("submit", "g", "--run-dir", "r", before="sys.modules['ray'] = None")
    assert ended.returncode == 5
    assert "pip install 'ray[default]>=2.40'" in ended.stderr and "Traceback" not in ended.stderr


def test_no_cluster_is_told_with_what_to_do() -> None:
    ended = penstock("submit", "g", "--run-dir", "r", "--address", "http://127.0.0.1:9")
    assert ended.returncode == 2
    assert "http://127.0.0.1:9" in ended.stderr and "ray start --head" in ended.stderr


def test_a_wrong_configuration_is_refused_before_the_cluster_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    from penstock.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["submit", "g", "--run-dir", "r", "--set", "train.lr=fast", "--address", "nowhere"])
    assert ended.value.code == 2
    assert "train.lr" in capsys.readouterr().err


def test_kubernetes_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    error = DataError("row 7 of s3://me:hunter2@host/g is not finite; " + "é" * 5000)
    exit_codes.write_termination_log(error, 3)  # outside of a pod
    monkeypatch.setenv("PENSTOCK_TERMINATION_LOG", str(log))
    exit_codes.write_termination_log(error, 3)
    assert log.read_text().startswith("penstock: exit code 3: DataError: row 7 of s3://***@host/g is")
    assert 4000 < len(log.read_bytes()) <= 4096
    monkeypatch.setenv("PENSTOCK_TERMINATION_LOG", str(tmp_path / "nowhere" / "log"))
    exit_codes.write_termination_log(error, 3)  # never a second error
