import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import xxhash

from penstock.storage.errors import FormatError
from penstock.storage.manifest import read_json, write_json
from penstock.storage.remote.files import RemoteError, open_remote
from penstock.storage.remote.lock import LOCK, LockLost, hold
from penstock.storage.remote.mirror import Mirror, forget, open_mirror
from penstock.storage.remote.pull import complete_checkpoints, pull

# A "training" that writes checkpoints of 2 MiB one after the other, keeping two, and mirrors them without a pause.
WRITER = """
import sys, shutil
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from penstock.storage.remote.mirror import open_mirror
from test_remote_mirror import write_checkpoint, write_run
folder, uri = Path(sys.argv[1]), sys.argv[2]
write_run(folder)
with open_mirror(folder, uri, interval_s=0.01):
    for step in range(1, 100_000):
        write_checkpoint(folder, step, payload=b"%09d" % step * 250_000)
        for old in sorted((folder / "checkpoints").glob("step-*"))[:-2]:
            shutil.rmtree(old)
        print(step, flush=True)
"""


def write_run(folder: Path, **result: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("dataset: x\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    if result:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model" / "model.safetensors").write_bytes(b"weights")
        (folder / "model" / "model.json").write_text("{}")
        write_json(folder / "result.json", result)


def write_checkpoint(folder: Path, step: int, payload: bytes = b"payload", note: str = "") -> Path:
    """As the trainers do: under a temporary name, then renamed."""
    final = folder / "checkpoints" / f"step-{step:09d}"
    temporary = final.with_name(f".{final.name}.tmp")
    temporary.mkdir(parents=True)
    (temporary / "model.safetensors").write_bytes(payload)
    entry = {"bytes": len(payload), "xxh3": xxhash.xxh3_64_hexdigest(payload)}
    (temporary / "state.json").write_text(json.dumps({"step": step, "note": note, "files": {"model": entry}}))
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    return final


def mirror_once(folder: Path, uri: str) -> None:
    with open_mirror(folder, uri, interval_s=1000):
        pass


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=["file", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"{request.param}://{tmp_path}/there"


def test_a_run_goes_there_and_comes_back(uri: str, tmp_path: Path) -> None:
    run, back = tmp_path / "run", tmp_path / "back"
    write_run(run, status="ok")
    write_checkpoint(run, 5)
    write_checkpoint(run, 7, b"newer")
    for name in ("train/packs/window", "chunks/x", ".lock", "checkpoints/.step-000000009.tmp/model.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"not durable")
    mirror_once(run, uri)
    remote = open_remote(uri)
    assert remote.names() == ["checkpoints", "config.yaml", "metrics.jsonl", "model", "result.json"]
    assert remote.names("checkpoints") == ["step-000000005", "step-000000007"]
    assert pull(uri, back)
    assert tree(back) == {
        "config.yaml": b"dataset: x\n",
        "metrics.jsonl": b'{"step": 1}\n{"step": 2}\n',
        "model/model.json": b"{}",
        "model/model.safetensors": b"weights",
        "result.json": (run / "result.json").read_bytes(),
        "checkpoints/step-000000007/model.safetensors": b"newer",
        "checkpoints/step-000000007/state.json": (run / "checkpoints/step-000000007/state.json").read_bytes(),
    }
    assert not pull(uri, back), "it is there already"


def test_there_is_nothing_to_bring_back(uri: str, tmp_path: Path) -> None:
    assert not pull(uri, tmp_path / "back") and not (tmp_path / "back").exists()


def test_a_thread_copies_while_the_run_grows(uri: str, tmp_path: Path) -> None:
    run, remote = tmp_path / "run", open_remote(uri)
    write_run(run)
    with open_mirror(run, uri, interval_s=0.05):
        write_checkpoint(run, 1)
        deadline = time.monotonic() + 20
        while not complete_checkpoints(remote):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_remote_checkpoints_go_only_after_a_newer_one_is_there(uri: str, tmp_path: Path) -> None:
    run, remote = tmp_path / "run", open_remote(uri)
    write_run(run)
    first = write_checkpoint(run, 1)
    with open_mirror(run, uri, interval_s=1000) as mirror:
        mirror.sync()
        shutil.rmtree(first)
        for _ in range(3):
            mirror.sync()
        assert remote.names("checkpoints") == ["step-000000001"]
        write_checkpoint(run, 2)
        mirror.sync()
        assert [each.step for each in complete_checkpoints(remote)] == [2, 1], "it may be renamed at this moment"
        mirror.sync()
        assert remote.names("checkpoints") == ["step-000000002"]


def test_a_checkpoint_that_is_replaced_keeps_its_remote_copy_until_the_new_one_is_there(
    uri: str, tmp_path: Path
) -> None:
    run, remote = tmp_path / "run", open_remote(uri)
    write_run(run)
    write_checkpoint(run, 1, b"old", "old")
    with open_mirror(run, uri, interval_s=1000) as mirror:
        mirror.sync()
        write_checkpoint(run, 1, b"new", "new")
        mirror.sync()
        assert [each.name for each in complete_checkpoints(remote)] == ["step-000000001.1", "step-000000001"]
        mirror.sync()
        assert remote.names("checkpoints") == ["step-000000001.1"]
    assert pull(uri, tmp_path / "back")
    assert (tmp_path / "back/checkpoints/step-000000001/model.safetensors").read_bytes() == b"new"


def test_a_second_process_goes_on_with_the_copy_of_the_first(uri: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    write_checkpoint(run, 1)
    mirror_once(run, uri)
    write_checkpoint(run, 2)
    mirror_once(run, uri)
    mirror_once(run, uri)
    assert open_remote(uri).names("checkpoints") == ["step-000000001", "step-000000002"]


def test_the_newest_complete_and_intact_checkpoint_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    write_run(run)
    for step in (1, 2, 3):
        write_checkpoint(run, step)
    mirror_once(run, there.as_uri())
    (there / "checkpoints/step-000000003/state.json").unlink()
    os.truncate(there / "checkpoints/step-000000002/model.safetensors", 3)
    assert pull(there.as_uri(), tmp_path / "back")
    assert [path.name for path in (tmp_path / "back" / "checkpoints").iterdir()] == ["step-000000001"]
    assert "step-000000002 is damaged, using the one before it" in caplog.text


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", ".hidden"])
def test_a_checkpoint_names_no_file_outside_of_it(tmp_path: Path, name: str) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    write_run(run)
    write_checkpoint(run, 1)
    state = run / "checkpoints" / "step-000000001" / "state.json"
    write_json(state, {**read_json(state), "files": {name: {"bytes": 1, "xxh3": "x"}}})
    mirror_once(run, there.as_uri())
    with pytest.raises(FormatError, match="which is no file of a checkpoint"):
        pull(there.as_uri(), tmp_path / "back")


def test_where_all_remote_checkpoints_are_damaged_nothing_starts_over_silently(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    write_run(run)
    write_checkpoint(run, 1)
    mirror_once(run, there.as_uri())
    (there / "checkpoints/step-000000001/model.safetensors").write_bytes(b"payloaX")
    with pytest.raises(FormatError, match="no checkpoint at .* is intact"):
        pull(there.as_uri(), tmp_path / "back")


def test_a_newer_local_run_is_kept_and_an_older_one_replaced(uri: str, tmp_path: Path) -> None:
    run, here = tmp_path / "run", tmp_path / "here"
    write_run(run)
    write_checkpoint(run, 5, b"theirs")
    mirror_once(run, uri)
    write_run(here)
    write_checkpoint(here, 6, b"ours")
    assert not pull(uri, here)
    shutil.rmtree(here / "checkpoints")
    write_checkpoint(here, 4, b"ours")
    assert pull(uri, here)
    assert [path.name for path in (here / "checkpoints").iterdir()] == ["step-000000005"]


def test_a_finished_remote_run_comes_back_to_a_folder_with_the_same_checkpoint(uri: str, tmp_path: Path) -> None:
    run, here = tmp_path / "run", tmp_path / "here"
    write_run(run, status="ok")
    write_checkpoint(run, 5)
    mirror_once(run, uri)
    write_run(here, status="stopped")
    write_checkpoint(here, 5)
    assert pull(uri, here)
    assert json.loads((here / "result.json").read_bytes())["status"] == "ok"


def test_forgetting_leaves_nothing_but_the_lock(uri: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, status="ok")
    write_checkpoint(run, 5)
    with hold(uri, "me", refresh_s=0.2):
        mirror_once(run, uri)
        forget(uri)
        assert open_remote(uri).names() == [LOCK]


def test_the_result_of_a_failed_run_arrives_too(uri: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run)
    with pytest.raises(ArithmeticError), open_mirror(run, uri):
        write_json(run / "result.json", {"status": "failed"})
        raise ArithmeticError
    assert json.loads(open_remote(uri).read("result.json"))["status"] == "failed"


@pytest.fixture
def unwritable(tmp_path: Path) -> str:
    (tmp_path / "file").write_text("a file, where a folder is wanted")
    return (tmp_path / "file" / "there").as_uri()


def test_a_last_copy_that_fails_is_raised(unwritable: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises((RemoteError, OSError), match="file/there"), open_mirror(tmp_path / "run", unwritable):
        pass


def test_what_a_run_failed_with_comes_before_its_copy_unless_it_promises_that(
    unwritable: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(ArithmeticError), open_mirror(tmp_path / "run", unwritable):
        raise ArithmeticError
    assert "the remote copy of the run is not up to date" in caplog.text
    with (
        pytest.raises(OSError, match="file/there") as raised,
        open_mirror(tmp_path / "run", unwritable, promises=(ArithmeticError,)),
    ):
        raise ArithmeticError
    assert isinstance(raised.value.__cause__, ArithmeticError)


def test_a_failure_in_the_background_is_said_once_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    write_run(run)
    there.write_text("in the way")
    with caplog.at_level(logging.WARNING), open_mirror(run, there.as_uri(), interval_s=0.05):
        time.sleep(1.0)
        there.unlink()
        deadline = time.monotonic() + 30
        while not (there / "metrics.jsonl").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert caplog.text.count("is not up to date, trying again") == 1


def test_nothing_is_written_once_the_lock_is_lost(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    write_run(run)
    with pytest.raises(LockLost, match="taken over by thief"), hold(there.as_uri(), "me") as lock:
        with open_mirror(run, there.as_uri(), lock=lock, interval_s=1000):
            write_checkpoint(run, 1)
            (there / LOCK).write_text('{"token": "x", "owner": "thief"}')
    assert [path.name for path in there.iterdir()] == [LOCK]


def test_files_may_vanish_and_be_replaced_while_they_are_copied(tmp_path: Path) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    write_run(run)
    done = threading.Event()

    def churn() -> None:
        step = 0
        while not done.is_set():
            step += 1
            for part in range(3):
                write_checkpoint(run, step, b"%d" % part * 100_000, note=str(part))
            shutil.rmtree(run / "checkpoints" / f"step-{step - 1:09d}", ignore_errors=True)

    thread = threading.Thread(target=churn)
    thread.start()
    mirror = Mirror(run, open_remote(there.as_uri()), None, 1.0)
    for number in range(40):
        mirror.sync()
        back = tmp_path / f"back{number}"
        pull(there.as_uri(), back)  # checks what is there; FormatError if a mixture were taken for complete
    done.set()
    thread.join()
    mirror.sync()
    newest = max(path.name for path in (run / "checkpoints").iterdir())
    assert pull(there.as_uri(), tmp_path / "last")
    assert tree(tmp_path / "last" / "checkpoints" / newest) == tree(run / "checkpoints" / newest)


def test_a_mirror_that_is_killed_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    there = tmp_path / "there"
    steps = []
    for number in range(3):
        run = tmp_path / f"run{number}"
        words = [sys.executable, "-c", WRITER, str(run), there.as_uri(), str(Path(__file__).parent)]
        writer = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 30
        while not (there.is_dir() and len(complete_checkpoints(open_remote(there.as_uri()))) > 1):
            assert writer.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.03 * number)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        back = tmp_path / f"back{number}"
        assert pull(there.as_uri(), back)
        (checkpoint,) = (back / "checkpoints").iterdir()
        steps.append(int(checkpoint.name.split("-")[1]))
        shutil.rmtree(there)
    assert all(step > 0 for step in steps)
