import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from penstock.storage.errors import DataError, DoesNotFit, FormatError
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import open_graph
from penstock.storage.manifest import read_json, write_json
from penstock.storage.remote import stage as staging
from penstock.storage.remote.files import open_remote
from penstock.storage.remote.stage import stage, staged

# Copies a store in pieces of 4 KiB and says so after each; ends, or waits to be killed, after as many as told.
COPIER = """
import sys, time
from pathlib import Path
from penstock.storage.remote import stage as staging
staging.PIECE_BYTES = 4096
uri, folder, pieces = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
seen = 0
def show(stage, done, total, unit, /, **numbers):
    global seen
    seen += 1
    print(done, total, flush=True)
    if seen == pieces:
        time.sleep(60)
staging.stage(uri, folder, progress=show, threads=2)
print("end", flush=True)
"""


def start_copier(uri: str, folder: Path, pieces: int = 0) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", COPIER, uri, str(folder), str(pieces)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = GenerateConfig(num_nodes=2000, num_features=16, avg_degree=4)
    return generate_graph(tmp_path / "source", config, host_memory=32 << 20).path


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 4096)


def payload(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("source.json", ".work")}


def test_a_store_is_copied_whole_and_then_reused(source: Path, tmp_path: Path, small_pieces: None) -> None:
    shown: list[tuple[int, int]] = []

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        shown.append((done, total))

    out = stage(source.as_uri(), tmp_path / "copy", progress=show)
    assert payload(out) == payload(source)
    open_graph(out).validate()
    assert shown[0][0] == 0 and shown[-1][0] == shown[-1][1] > 100_000
    marks = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    stage(source.as_uri(), out, progress=lambda *_, **__: pytest.fail("copied again"))
    assert marks == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}


def test_a_killed_copy_goes_on_with_the_pieces_that_are_there(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    first = start_copier(source.as_uri(), out, pieces=30)
    assert first.stdout is not None
    lines = [first.stdout.readline() for _ in range(30)]
    first.kill()
    first.communicate()
    assert not (out / "manifest.json").exists() and list(out.glob(".*.part"))
    done = int(lines[-1].split()[0])
    second = start_copier(source.as_uri(), out)
    said, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert int(said.split()[0]) >= done > 0
    assert payload(out) == payload(source)


def test_pieces_that_were_damaged_meanwhile_are_copied_again(source: Path, tmp_path: Path, small_pieces: None) -> None:
    out = tmp_path / "copy"

    def cut(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stage(source.as_uri(), out, progress=cut)
    parts = list(out.glob(".*.part"))
    assert parts
    for part in parts:
        with open(part, "r+b") as file:
            file.write(b"\xff" * 100)
    stage(source.as_uri(), out)
    assert payload(out) == payload(source)


def test_of_two_processes_one_copies_and_the_other_waits(source: Path, tmp_path: Path) -> None:
    copiers = [start_copier(source.as_uri(), tmp_path / "copy") for _ in range(2)]
    said = [copier.communicate(timeout=60) for copier in copiers]
    assert [copier.returncode for copier in copiers] == [0, 0], said
    assert payload(tmp_path / "copy") == payload(source)
    moved = [
        sum(line.split()[0] == "0" and line.split()[1] != "1" for line in out.splitlines()[:-1]) for out, _ in said
    ]
    assert sorted(moved) == [0, 1], "both began to copy"


def test_a_waiting_process_says_for_whom_and_goes_on_when_that_dies(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, small_pieces: None
) -> None:
    first = start_copier(source.as_uri(), tmp_path / "copy", pieces=5)
    assert first.stdout is not None
    for _ in range(5):
        first.stdout.readline()
    waits = 0

    def show(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        nonlocal waits
        waits += unit == "copies"
        if waits == 2:
            os.kill(first.pid, signal.SIGKILL)

    stage(source.as_uri(), tmp_path / "copy", progress=show)
    first.communicate()
    assert f"is being copied by process {first.pid} on host " in caplog.text and " since " in caplog.text
    assert payload(tmp_path / "copy") == payload(source)


def test_a_process_that_is_stuck_in_copying_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "IDLE_S", 0.5)
    first = start_copier(source.as_uri(), tmp_path / "copy", pieces=5)
    assert first.stdout is not None
    for _ in range(5):
        first.stdout.readline()
    with pytest.raises(ValueError, match=f"by process {first.pid} on host .* no piece for .*--stage-dir"):
        stage(source.as_uri(), tmp_path / "copy")
    first.kill()
    first.communicate()


def test_a_truncated_remote_file_is_named_and_leaves_no_dataset(source: Path, tmp_path: Path) -> None:
    os.truncate(source / "features.npy", 5000)
    with pytest.raises(FormatError, match="source/features.npy has 5000 bytes, its manifest says"):
        stage(source.as_uri(), tmp_path / "copy")
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_missing_remote_file_is_named(source: Path, tmp_path: Path) -> None:
    (source / "labels.npy").unlink()
    with pytest.raises(FormatError, match="source/labels.npy is missing"):
        stage(source.as_uri(), tmp_path / "copy")


def test_a_wrong_checksum_is_copied_once_more_and_then_refused(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open(source / "indices.npy", "r+b") as file:
        file.seek(2000)
        file.write(b"\xff\xff")
    with pytest.raises(FormatError, match="source/indices.npy does not have the checksum .* twice"):
        stage(source.as_uri(), tmp_path / "copy")
    assert "copying it again" in caplog.text
    assert not (tmp_path / "copy" / "manifest.json").exists()


def test_a_store_that_is_replaced_meanwhile_is_noticed(source: Path, tmp_path: Path) -> None:
    def replace(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        value = read_json(source / "manifest.json")
        value["meta"]["source"] = "another"
        write_json(source / "manifest.json", value)

    with pytest.raises(DataError, match="was replaced while it was being copied"):
        stage(source.as_uri(), tmp_path / "copy", progress=replace)
    assert not (tmp_path / "copy" / "manifest.json").exists()
    assert open_graph(stage(source.as_uri(), tmp_path / "copy")).meta.source == "another"


def test_a_replaced_store_is_copied_anew_unless_somebody_reads_the_earlier_one(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    with staged(source.as_uri(), out):
        earlier = payload(out)
        with staged(source.as_uri(), out):
            pass  # readers share it
        shutil.rmtree(source)
        generate_graph(source, GenerateConfig(num_nodes=1000, num_features=8, avg_degree=4), host_memory=32 << 20)
        with pytest.raises(ValueError, match="has changed, and another process on this host still reads"):
            stage(source.as_uri(), out)
        assert payload(out) == earlier
    with staged(source.as_uri(), out):
        assert payload(out) == payload(source) != earlier
        open_graph(out).validate()


def test_a_local_copy_that_was_damaged_is_mended(source: Path, tmp_path: Path) -> None:
    out = stage(source.as_uri(), tmp_path / "copy")
    os.truncate(out / "features.npy", 10)
    before = (out / "indices.npy").stat().st_ino
    stage(source.as_uri(), out)
    assert payload(out) == payload(source) and (out / "indices.npy").stat().st_ino == before


@pytest.mark.parametrize("name", ["../escaped.npy", "/tmp/escaped.npy", ".work/x", "", "manifest.json", "a/../../x"])
def test_names_in_a_remote_manifest_cannot_leave_the_folder(source: Path, tmp_path: Path, name: str) -> None:
    value = read_json(source / "manifest.json")
    value["files"][0]["name"] = name
    write_json(source / "manifest.json", value)
    with pytest.raises(FormatError, match="leaves the folder|is no name"):
        stage(source.as_uri(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_where_there_is_no_store_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing/manifest.json does not exist"):
        stage((tmp_path / "nothing").as_uri(), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_disk_that_is_too_small_is_said_before_anything_is_copied(tmp_path: Path, small_disk: Path) -> None:
    config = GenerateConfig(num_nodes=60_000, num_features=128, avg_degree=4)
    source = generate_graph(tmp_path / "source", config, host_memory=64 << 20).path
    with pytest.raises(
        DoesNotFit, match=r"needs \d+ bytes for what is still to be copied, its disk has \d+ free"
    ) as no:
        stage(source.as_uri(), small_disk / "copy")
    assert no.value.disk_bytes is not None and no.value.disk_bytes > 30_000_000
    assert not list((small_disk / "copy").glob("*.npy"))


def test_a_disk_that_fills_up_meanwhile_leaves_a_copy_that_can_go_on(tmp_path: Path, small_disk: Path) -> None:
    config = GenerateConfig(num_nodes=60_000, num_features=64, avg_degree=4)
    source = generate_graph(tmp_path / "source", config, host_memory=64 << 20).path
    out = small_disk / "copy"

    def fill(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if not (small_disk / "other").exists():
            (small_disk / "other").write_bytes(b"x" * (12 << 20))

    with pytest.raises(DoesNotFit, match="the disk is full while writing"):
        stage(source.as_uri(), out, progress=fill)
    (small_disk / "other").unlink()
    np.testing.assert_array_equal(open_graph(stage(source.as_uri(), out)).indices, open_graph(source).indices)
    open_graph(out).validate()


def test_a_store_is_read_from_memory_too(source: Path, tmp_path: Path) -> None:
    remote = open_remote(f"memory://{tmp_path}/store")
    for path in source.iterdir():
        if path.is_file():
            remote.upload(path, path.name)
    stage(remote.uri, tmp_path / "copy")
    assert payload(tmp_path / "copy") == payload(source)
