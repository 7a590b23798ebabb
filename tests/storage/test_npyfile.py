import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.manifest import checksum_file
from penstock.storage.npyfile import NpyWriter, drop_pages, npy_entry, npy_header, open_npy, write_npy

DTYPES = ["float32", "float16", "uint16", "int8", "uint8", "int32", "int64"]


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 2**40), min_size=1, max_size=3))
def test_headers_fill_a_page(dtype: str, shape: list[int]) -> None:
    header = npy_header(np.dtype(dtype), tuple(shape))
    assert len(header) == 4096 and header.endswith(b"\n")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (5,), (7, 3), (0, 4)])
def test_numpy_reads_what_we_write(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    entry = write_npy(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array)
    mapped = open_npy(tmp_path / "a.npy")
    assert mapped.dtype == dtype and mapped.shape == shape
    assert entry.xxh3 == checksum_file(tmp_path / "a.npy") and entry.bytes == 4096 + array.nbytes
    assert npy_entry(tmp_path / "a.npy", entry.xxh3) == entry


def test_parts_add_up(tmp_path: Path) -> None:
    with NpyWriter(tmp_path / "a.npy", np.float32, (4, 2)) as writer:
        writer.append(np.ones((3, 2)))
        writer.append(np.zeros((1, 2), np.float32)[:, ::-1])
    assert np.load(tmp_path / "a.npy").tolist() == [[1, 1]] * 3 + [[0, 0]]


def test_wrong_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="got 1 rows of 2"), NpyWriter(tmp_path / "a.npy", "f4", (2, 3)) as writer:
        writer.append(np.zeros((1, 3)))
    assert writer.entry is None
    with NpyWriter(tmp_path / "b.npy", np.int32, (2, 3)) as writer:
        with pytest.raises(ValueError, match=r"rows of shape \(4,\) do not belong"):
            writer.append(np.zeros((2, 4), np.int32))
        with pytest.raises(TypeError):
            writer.append(np.zeros((2, 3)))  # floats do not become integers silently
        writer.append(np.zeros((2, 3), np.int32))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut header", "cut data", "pickle"])
def test_damaged_arrays_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.npy"
    write_npy(path, np.arange(2000))
    data = path.read_bytes()
    if damage == "pickle":
        np.save(path, np.array([{}], dtype=object))
    else:
        changed: dict[str, Any] = {"empty": b"", "cut header": data[:100], "cut data": data[:-1]}
        path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    with pytest.raises(FormatError, match="cannot be mapped as .npy"):
        open_npy(path)


def test_mapping_a_file_parses_no_python(tmp_path: Path) -> None:
    """CPython 3.11 counts the depth of its parser for all threads together, so two that parse at once may fail."""
    write_npy(tmp_path / "a.npy", np.arange(12).reshape(3, 4))
    compiled: list[Any] = []
    listens = True

    def hook(event: str, arguments: Any) -> None:  # a hook stays for the life of the process
        if listens and event == "compile":
            compiled.append(arguments)

    sys.addaudithook(hook)
    try:
        assert np.load(tmp_path / "a.npy").shape == (3, 4) and len(compiled) == 1
        assert open_npy(tmp_path / "a.npy").shape == (3, 4) and len(compiled) == 1
    finally:
        listens = False


def test_a_full_disk_is_clear(small_disk: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"the disk is full while writing .*a.npy"):
        write_npy(small_disk / "a.npy", np.zeros(30 << 20, np.uint8))


def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    write_npy(tmp_path / "a.npy", np.arange(5000))
    array = open_npy(tmp_path / "a.npy")
    assert array.sum() == 12_497_500
    drop_pages(array)
    drop_pages(array[3:7])
    drop_pages(np.arange(3))  # not mapped: nothing happens
    assert array.sum() == 12_497_500
