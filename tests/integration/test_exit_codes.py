"""Every error has the exit code that the documents give it, and a rendered Job goes by them."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from penstock import exit_codes
from penstock.__main__ import main
from penstock.cluster.feeder_pool import FeederPool
from penstock.config import load_config
from penstock.engine.chunked.backend import NodeLost, NoRoomYet, RankFailed
from penstock.engine.supervision.restarts import run_with_restarts
from penstock.engine.trainstate import Stopped
from penstock.exit_codes import exit_code
from penstock.kubernetes import render
from penstock.launch_options import KubernetesOptions
from penstock.storage.errors import DataError, DoesNotFit, FormatError, InUse, MissingDependency
from penstock.storage.graph import GraphStore
from penstock.storage.remote.files import RemoteError, open_remote
from penstock.storage.remote.hostlock import flocked
from penstock.storage.remote.lock import LockLost, hold
from penstock.storage.transfer import Address

DOCS = Path(__file__).parents[2] / "docs" / "command-line.md"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AssertionError("ours"), 1),
        (RankFailed("rank 1 was ended by SIGKILL: out of memory, perhaps"), 1),
        (ValueError("an option"), 2),
        (DataError("a table"), 3),
        (FormatError("a manifest"), 3),
        (DoesNotFit("memory"), 4),
        (MissingDependency("s3fs"), 5),
        (ImportError("no module"), 5),
        (Stopped("a checkpoint"), 75),
        (RemoteError("no answer"), 75),
        (InUse("the folder"), 75),
        (LockLost("taken over"), 75),
        (NodeLost("with its rank"), 75),
        (NoRoomYet("2 ranks"), 75),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_errors_have_their_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_a_lost_head_asks_to_be_run_again() -> None:
    head = pytest.importorskip("penstock.cluster.head")
    assert exit_code(head.HeadLost("of 10.0.0.1")) == 75


def test_the_documents_have_the_same_codes() -> None:
    def codes(text: str) -> list[int]:
        return [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]

    table = DOCS.read_text().partition("## Exit codes")[2].partition("## ")[0]
    names = ("OK", "INTERNAL", "USAGE", "DATA", "DOES_NOT_FIT", "MISSING", "RETRY", "INTERRUPTED", "KILLED")
    wanted = [getattr(exit_codes, name) for name in names]
    assert codes(table) == codes(exit_codes.__doc__ or "") == wanted


def test_a_job_fails_for_good_only_where_a_retry_helps_nothing() -> None:
    config = load_config(flags={"dataset": "s3://b/g", "run_dir": "s3://b/r", "remote.stage_dir": "/x"})
    job = next(found for found in yaml.safe_load_all(render(config, KubernetesOptions())) if found["kind"] == "Job")
    by_action = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["spec"]["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    curable = {exit_code(error) for error in (InUse(""), NodeLost(""), NoRoomYet(""), RemoteError(""), Stopped(""))}
    assert by_action == {"FailJob": [2, 3, 4, 5], "Ignore": [75]} and curable == {75}


def test_whoever_finds_a_folder_taken_is_asked_to_run_again(
    tmp_path: Path, make_graph: Callable[..., GraphStore], capsys: pytest.CaptureFixture[str]
) -> None:
    graph = make_graph(4, [[0, 1], [1, 2], [2, 3]])
    with flocked(tmp_path / "run" / ".lock"), pytest.raises(SystemExit) as ended:
        main(["plan", str(graph.path), "--run-dir", str(tmp_path / "run"), "--quiet"])
    assert ended.value.code == 75 and "run is in use by process" in capsys.readouterr().err
    uri = (tmp_path / "remote").as_uri()
    with hold(uri, "the holder", refresh_s=0.05), pytest.raises(InUse) as caught, hold(uri, "me", refresh_s=0.05):
        pytest.fail("it was taken")
    assert exit_code(caught.value) == 75 and open_remote(uri).names() == []


def test_feeders_without_room_ask_to_be_run_again() -> None:
    class Waiting:
        address: Address | None = None
        where = "a node that Ray has not chosen yet"

        def look(self) -> str | None:
            return None

        def stop(self) -> None:
            pass

    pool = FeederPool(Waiting, b"", count=1, retries=0)
    with pytest.raises(NoRoomYet, match="0 of 1 feeders are ready"):
        pool.wait_ready(0.01)
    pool.close()


def test_retries_are_used_for_a_lost_node_and_for_the_room_that_it_leaves() -> None:
    raised: list[Exception] = [NodeLost("rank 1"), NoRoomYet("nowhere")]

    def attempt(number: int) -> int:
        if number < len(raised):
            raise raised[number]
        return number

    assert run_with_restarts(attempt, 2) == 2
    raised.append(NoRoomYet("still nowhere"))
    with pytest.raises(NoRoomYet, match="still nowhere"):
        run_with_restarts(attempt, 2)
    raised[:] = [NoRoomYet("never was any"), AssertionError("not reached")]
    with pytest.raises(NoRoomYet, match="never was any"):
        run_with_restarts(attempt, 2)
