import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from patience import Deadline, allowed_s

from penstock.__main__ import main
from penstock.cluster import jobs as jobs_module
from penstock.cluster.jobs import Jobs, open_jobs
from penstock.config import load_config
from penstock.launch_options import SubmitOptions
from penstock.launch_verbs import run_submit, submission_id
from penstock.storage.graph import GraphStore

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # Ray's client, of aiohttp
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),  # as Ray leaves a log that it lost
]

ARGUMENTS = ("--epochs=1", "--batch-size=64", "--fanouts=3,3", "--disk=1GiB", "--threads=1")


class Cluster:
    """Ray on this machine, started as a user would, ended by ending its own processes and no others."""

    def __init__(self, folder: Path) -> None:
        self.address = f"http://127.0.0.1:{_free_port()}"
        scripts = Path(sys.executable).parent
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "PATH": f"{scripts}:{os.environ['PATH']}"}
        environment.pop("RAY_ADDRESS", None)
        if not (Path.home() / ".ray" / "auth_token").exists():
            subprocess.run([scripts / "ray", "get-auth-token", "--generate"], check=True, capture_output=True)
        # also what has a usual number: another cluster of this machine may have it
        ports = ("port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
        options = {name: _free_port() for name in ports}
        options |= {"dashboard-port": int(self.address.rsplit(":", 1)[1]), "num-cpus": 2}
        # ray start --block ends with what it started
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    str(scripts / "ray"),
                    "start",
                    "--head",
                    "--block",
                    "--include-dashboard=true",
                    "--disable-usage-stats",
                ]
                + [f"--temp-dir={folder}", *(f"--{name}={value}" for name, value in options.items())],
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def connect(self) -> Jobs:
        deadline = Deadline(60)
        while True:
            try:
                return open_jobs(self.address)
            except ValueError:
                assert not deadline.is_over and self.process.poll() is None
                time.sleep(0.2)

    def dashboard(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in children if any("dashboard.py" in part for part in child.cmdline()))

    def stop(self) -> None:
        family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=allowed_s(20))
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Ray's sockets lie below its folder, and their paths may not be long
    folder = Path(f"/tmp/penstock-jobs-{os.getpid()}")
    folder.mkdir()
    found = Cluster(folder)
    try:
        found.connect()
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def jobs(cluster: Cluster) -> Jobs:
    return cluster.connect()


class Command:
    """`penstock submit` in this process, from a folder: starting Python takes longer than submitting."""

    def __init__(self, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
        self._address, self._capsys = cluster.address, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["submit", *arguments, f"--address={self._address}"])
        assert isinstance(ended.value.code, int)
        return ended.value.code, *self._capsys.readouterr()


@pytest.fixture
def submit(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Command:
    monkeypatch.setenv("MY_API_TOKEN", "hunter2-hunter2")
    monkeypatch.chdir(tmp_path)
    return Command(cluster, capsys)


@pytest.mark.slow
def test_follows_a_job_to_its_end_and_tells_its_exit_code(jobs: Jobs, tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text("of the job\n")
    command = (
        "ls -A; cat given.yaml; echo SAFE=$PYTHONSAFEPATH; for i in 1 2 3; do echo line $i; sleep 0.1; done; exit 4"
    )
    assert jobs.submit("a", command, tmp_path)
    lines = list[str]()
    job = jobs.follow("a", lines.append)
    text = "".join(lines)
    assert (job.status, job.exit_code) == ("FAILED", 4)
    assert text.endswith("given.yaml\nof the job\nSAFE=1\nline 1\nline 2\nline 3\n")
    again = list[str]()
    assert jobs.follow("a", again.append).exit_code == 4
    assert "".join(again) == text


def test_an_id_is_taken_once_and_attempts_are_in_order(jobs: Jobs, tmp_path: Path) -> None:
    for name in ("b-r10", "bb", "b-r2"):
        assert jobs.submit(name, "true", tmp_path)
    assert not jobs.submit("b-r2", "true", tmp_path)
    assert [job.id for job in jobs.attempts("b")] == ["b-r2", "b-r10"]


@pytest.mark.slow
def test_a_killed_driver_has_a_shells_exit_code(jobs: Jobs, tmp_path: Path) -> None:
    jobs.submit("killed", "kill -9 $$", tmp_path)
    assert jobs.follow("killed", lambda _: None).exit_code == 137


@pytest.mark.slow
def test_a_silent_cluster_is_an_error_and_not_a_hang(
    cluster: Cluster, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.submit("silent", "echo begun; sleep 600", tmp_path)
    for name, value in {"_REQUEST_S": 1.0, "_LOST_S": 1.0, "_CHECK_S": 0.2}.items():
        monkeypatch.setattr(jobs_module, name, value)
    dashboard, said = cluster.dashboard(), list[str]()

    def freeze(text: str) -> None:
        said.append(text)
        if "begun" in text:
            dashboard.send_signal(signal.SIGSTOP)

    try:
        with pytest.raises(ConnectionError, match="submit the same"):
            jobs.follow("silent", freeze)
    finally:
        dashboard.send_signal(signal.SIGCONT)
    assert "begun\n" in "".join(said)
    cluster.connect()._client.stop_job("silent")


def test_another_token_is_refused_by_name(
    cluster: Cluster, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(ValueError, match="refuses this token.*auth_token"):
        open_jobs(cluster.address)


@pytest.mark.slow
def test_submitting_twice_trains_once(submit: Command, tiny_graph: GraphStore, tmp_path: Path) -> None:
    # the run folder is relative here, and elsewhere on the cluster
    arguments = (str(tiny_graph.path), "--run-dir=runs/a", "--host-memory=64MiB", *ARGUMENTS)
    code, said, errors = submit(*arguments)
    assert code == 0, errors
    assert "submitted" in said and "test accuracy" in said
    assert "hunter2" not in said + errors
    result = tmp_path / "runs" / "a" / "result.json"
    before = result.read_bytes()
    code, said, errors = submit(*arguments, "--result-json=out/copy.json")
    assert code == 0, errors
    assert f"already done; the result is in {result}" in said
    assert result.read_bytes() == before
    copy = json.loads((tmp_path / "out" / "copy.json").read_text())
    assert copy["metrics"] == json.loads(before)["metrics"] and copy["submission"]["already_done"]


@pytest.mark.slow
def test_a_failed_run_has_its_own_exit_code_and_is_submitted_again(
    submit: Command, jobs: Jobs, tiny_graph: GraphStore
) -> None:
    arguments = (str(tiny_graph.path), "--run-dir=run", "--host-memory=1KiB", "--json", *ARGUMENTS)
    code, out, errors = submit(*arguments)
    assert code == 4 and "is too small" in errors
    said = json.loads(out)
    assert said["status"] == "FAILED" and said["exit_code"] == 4 and not said["attached"]
    again = json.loads(submit(*arguments, "--no-wait")[1])
    jobs._client.stop_job(again["submission_id"])  # others want the cores
    assert again["submission_id"] == f"{said['submission_id']}-r2" and again["exit_code"] == 0


@pytest.mark.slow
def test_a_job_that_runs_is_followed_and_not_submitted(
    cluster: Cluster, jobs: Jobs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(flags={"dataset": tmp_path / "graph", "run_dir": tmp_path / "run"})
    base = submission_id(config)
    jobs.submit(base, "echo working; sleep 3; exit 75", tmp_path)
    there = SubmitOptions(address=cluster.address)
    with pytest.raises(ValueError, match=f"stop it first: ray job stop {base}"):
        run_submit(config, there, how="force", copy=None, quiet=False)
    assert run_submit(config, there, how="resume", copy=tmp_path / "result.json", quiet=False) == 75
    said = capsys.readouterr().out
    assert "runs already" in said and "working\n" in said and "exit code 75" in said
    assert [job.id for job in jobs.attempts(base)] == [base]
    copy = json.loads((tmp_path / "result.json").read_text())  # the run left none
    assert copy["status"] == "failed" and copy["submission"]["exit_code"] == 75


@pytest.mark.slow
def test_an_interrupt_leaves_the_job_running(cluster: Cluster, jobs: Jobs, tmp_path: Path) -> None:
    base = submission_id(load_config(flags={"dataset": tmp_path / "graph", "run_dir": tmp_path / "run"}))
    jobs.submit(base, "echo working; sleep 600", tmp_path)
    command = [sys.executable, "-m", "penstock", "submit", "graph", "--run-dir=run", f"--address={cluster.address}"]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as following:
        assert following.stdout is not None and following.stderr is not None
        for line in following.stdout:
            if line == "working\n":
                break
        following.send_signal(signal.SIGINT)
        assert following.wait(timeout=allowed_s(60)) == 130
        assert f"the job goes on; to stop it: ray job stop {base}" in following.stderr.read()
    assert jobs.find(base).status == "RUNNING"
