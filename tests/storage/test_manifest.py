from pathlib import Path
from typing import Any

import pytest

from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.manifest import (
    FileEntry,
    Manifest,
    checksum_file,
    is_published,
    read_json,
    read_manifest,
    validate_files,
    write_atomic,
    write_json,
    write_manifest,
)


def _publish(folder: Path, **change: Any) -> Manifest:
    (folder / "data.bin").write_bytes(b"some bytes")
    entry = FileEntry(name="data.bin", bytes=10, dtype="uint8", shape=(10,), xxh3=checksum_file(folder / "data.bin"))
    manifest = Manifest(format="penstock/graph", version=1, meta={"n": 3}, files=(entry,))
    write_manifest(folder, manifest)
    if change:
        path = folder / "manifest.json"
        write_json(path, read_json(path) | change)
    return manifest


def test_a_manifest_comes_back_as_it_was(tmp_path: Path) -> None:
    assert not is_published(tmp_path)
    manifest = _publish(tmp_path)
    assert is_published(tmp_path)
    assert read_manifest(tmp_path, "penstock/graph") == manifest
    assert manifest.file("data.bin").bytes == 10
    with pytest.raises(FormatError, match=r"lists no file 'x'; it has \['data.bin'\]"):
        manifest.file("x")
    validate_files(tmp_path, manifest)


def test_equal_values_give_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, "é"]})
    write_json(tmp_path / "b.json", {"a": [1.5, "é"], "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert read_json(tmp_path / "a.json") == {"b": 1, "a": [1.5, "é"]}


ENTRY = {"name": "data.bin", "bytes": 10, "dtype": "uint8", "shape": [10], "xxh3": "00"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "penstock/trace"}, r"has format 'penstock/trace', wanted 'penstock/graph'"),
        ({"version": 2}, r"has version 2 of penstock/graph; this release reads \[1\]"),
        ({"version": "1"}, r"has version '1'"),
        ({"more": 1}, r"has keys .*'more'"),
        ({"files": [{"name": "x"}]}, r"a file entry is malformed"),
        ({"files": [ENTRY | {"more": 1}]}, r"a file entry is malformed"),
        ({"files": [ENTRY | {"name": "../x"}]}, r"file name '../x' leaves the folder"),
        ({"files": [ENTRY | {"name": "a/../../x"}]}, r"leaves the folder"),
        ({"files": [ENTRY | {"name": "/etc/passwd"}]}, r"leaves the folder"),
        ({"files": None}, r"a file entry is malformed"),
    ],
)
def test_manifests_are_read_strictly(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _publish(tmp_path, **change)
    with pytest.raises(FormatError, match=message):
        read_manifest(tmp_path, "penstock/graph")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_damaged_manifests_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin1"))
    with pytest.raises(FormatError, match="manifest.json"):
        read_manifest(tmp_path, "penstock/graph")


def test_a_missing_manifest_says_so(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="does not exist: the folder is not complete"):
        read_manifest(tmp_path, "penstock/graph")


def test_files_that_differ_are_named(tmp_path: Path) -> None:
    manifest = _publish(tmp_path)
    data = tmp_path / "data.bin"
    data.write_bytes(b"same bytes")  # as long, but not the same
    validate_files(tmp_path, manifest, checksums=False)
    with pytest.raises(FormatError, match=r"data.bin has checksum \w+, its manifest says"):
        validate_files(tmp_path, manifest)
    data.write_bytes(b"short")
    with pytest.raises(FormatError, match=r"data.bin has 5 bytes, its manifest says 10"):
        validate_files(tmp_path, manifest, checksums=False)
    data.unlink()
    with pytest.raises(FormatError, match=r"data.bin is missing"):
        validate_files(tmp_path, manifest)


def test_a_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    write_atomic(small_disk / "x", b"old")
    with pytest.raises(DoesNotFit, match="the disk is full while writing"):
        write_atomic(small_disk / "x", bytes(30 << 20))
    assert (small_disk / "x").read_bytes() == b"old"
