"""Ingest that runs again: done is judged by the content of the inputs, and what differs is said in words."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.storage.graph import GraphStore
from penstock.storage.ingest import IngestOptions, ingest_npy, ingest_parquet, inputs
from penstock.storage.manifest import read_json, write_json

MEMORY = 32 << 20


def _tables(folder: Path, parts: int = 1) -> Path:
    table = pa.table({"id": range(6), "feature": [[1.0, 2.0]] * 6, "split": ["train"] * 6})
    for n in range(parts):
        path = folder / "n.parquet" / f"part-{n}.parquet" if parts > 1 else folder / "n.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(n * 6 // parts, 6 // parts), path)
    pq.write_table(pa.table({"src": [0, 1], "dst": [1, 2]}), folder / "e.parquet")
    return folder


def _run(folder: Path, out: Path, **options: Any) -> GraphStore:
    tables = folder / "n.parquet", folder / "e.parquet"
    return ingest_parquet(*tables, out, IngestOptions(**options), host_memory=MEMORY)


def _age(folder: Path) -> None:
    """Wait until the files' times are settled, as they are in earnest."""
    time.sleep(2.1)
    assert folder.exists()


def test_a_copy_of_the_inputs_is_done(tmp_path: Path) -> None:
    first, out = _tables(tmp_path / "a", parts=2), tmp_path / "out"
    stamp = (_run(first, out).path / "manifest.json").stat().st_mtime_ns
    second = tmp_path / "b"
    shutil.copytree(first, second, copy_function=shutil.copyfile)
    for path in second.rglob("part-*"):
        path.rename(path.with_name(path.name.replace("part", "part-00000-8e1f")))  # names are the writer's whim
        os.utime(first / "n.parquet" / path.name, (0, 0))
    for folder in (first, second):
        assert (_run(folder, out).path / "manifest.json").stat().st_mtime_ns == stamp


def test_what_differs_is_said_in_words(tmp_path: Path) -> None:
    folder, out = _tables(tmp_path / "a"), tmp_path / "out"
    _run(folder, out)
    pq.write_table(pa.table({"src": [0, 1], "dst": [1, 3]}), folder / "e.parquet")  # as many bytes
    with pytest.raises(
        ValueError, match="built from something else: the edge table has other content;.*delete this one"
    ):
        _run(folder, out)
    pq.write_table(pa.table({"src": [0, 1, 2] * 50, "dst": [1, 2, 3] * 50}), folder / "e.parquet")
    with pytest.raises(ValueError, match=r"the edge table has other content \([\d,]+ bytes, [\d,]+ before\)"):
        _run(folder, out)
    with pytest.raises(ValueError, match=r"options.undirected \(False there, True asked\)"):
        _run(_tables(tmp_path / "c"), out, undirected=True)
    with pytest.raises(ValueError, match="file 1 of the node table is new; .*the node table is no longer there"):
        _run(_tables(tmp_path / "d", parts=2), out)
    shutil.rmtree(out)  # the remedy
    assert _run(folder, out).num_edges == 150


def test_a_store_of_another_release_is_said_to_be(tmp_path: Path) -> None:
    folder, out = _tables(tmp_path / "a"), tmp_path / "out"
    _run(folder, out)
    write_json(out / "source.json", read_json(out / "source.json") | {"version": 1})
    with pytest.raises(ValueError, match="another release of Penstock built: .*delete this one to build it again"):
        _run(folder, out)


def test_unused_files_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, values in {"features": np.ones((3, 2)), "src": np.array([0]), "dst": np.array([1])}.items():
        np.save(folder / f"{name}.npy", values)
    store = ingest_npy(folder, tmp_path / "out", IngestOptions(), host_memory=MEMORY)
    np.save(folder / "notes.npy", np.ones(1))
    assert ingest_npy(folder, store.path, IngestOptions(), host_memory=MEMORY).fingerprint == store.fingerprint
    np.save(folder / "labels.npy", np.ones(3))
    with pytest.raises(ValueError, match="labels.npy is new"):
        ingest_npy(folder, store.path, IngestOptions(), host_memory=MEMORY)


def test_files_that_cannot_have_changed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = _tables(tmp_path / "a"), tmp_path / "out"
    _age(folder)
    _run(folder, out)
    read: list[str] = []
    digest = inputs._digest

    def counted(path: Path, *rest: Any) -> str:
        read.append(path.name)
        return digest(path, *rest)

    monkeypatch.setattr(inputs, "_digest", counted)
    _run(folder, out)
    assert read == []
    data = (folder / "e.parquet").read_bytes()
    (folder / "e.parquet").write_bytes(data)  # the same bytes, but nobody can know
    stat = (folder / "e.parquet").stat()
    os.utime(folder / "e.parquet", ns=(stat.st_atime_ns, 1))
    _run(folder, out)
    assert read == ["e.parquet"]


def test_files_that_were_just_written_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second change within one tick of the file system's clock would not show in the times."""
    monkeypatch.setattr(inputs, "_SETTLED_NS", 10**15)
    folder, out = _tables(tmp_path / "a"), tmp_path / "out"
    _run(folder, out)
    assert "notes" not in read_json(out / "source.json")
