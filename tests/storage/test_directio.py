import logging
import os
from pathlib import Path

import numpy as np
import pytest

from penstock.storage import directio
from penstock.storage.directio import PAGE, DirectFile, aligned_buffer, page_down, page_up
from penstock.storage.errors import DoesNotFit, FormatError


def _data(num_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(num_bytes).integers(0, 256, num_bytes, np.uint8)


def test_pages_round(tmp_path: Path) -> None:
    assert [page_up(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]
    assert [page_down(n) for n in (0, PAGE - 1, PAGE)] == [0, 0, PAGE]
    buffer = aligned_buffer(5000)
    assert len(buffer) == 2 * PAGE and buffer.ctypes.data % PAGE == 0 and buffer.flags.writeable and not buffer.any()


@pytest.mark.parametrize("direct", [True, False])
def test_transfers_are_exact(tmp_path: Path, direct: bool) -> None:
    data, buffer = _data(5 * PAGE), aligned_buffer(5 * PAGE)
    with DirectFile(tmp_path / "x", "write", direct=direct) as file:
        file.reserve(5 * PAGE)
        for page in (3, 0, 4, 1, 2):
            buffer[:PAGE] = data[page * PAGE : (page + 1) * PAGE]
            file.write_from(buffer, page * PAGE, PAGE)
        file.sync()
    assert (tmp_path / "x").read_bytes() == data.tobytes()
    with DirectFile(tmp_path / "x", "read", direct=direct) as file:
        assert file.num_bytes == 5 * PAGE
        file.read_into(buffer, 0, 5 * PAGE)
        np.testing.assert_array_equal(buffer, data)
        buffer[:] = 0
        file.read_into(buffer, 3 * PAGE, 2 * PAGE)
        np.testing.assert_array_equal(buffer[: 2 * PAGE], data[3 * PAGE :])
        file.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [2 * PAGE + 1, 3 * PAGE - 1, 3 * PAGE])
def test_the_last_page_may_be_cut(tmp_path: Path, direct: bool, size: int) -> None:
    data, buffer = _data(size), aligned_buffer(3 * PAGE)
    (tmp_path / "x").write_bytes(data.tobytes())
    with DirectFile(tmp_path / "x", "read", direct=direct) as file:
        file.read_into(buffer, 0, 3 * PAGE)
    np.testing.assert_array_equal(buffer[:size], data)


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [0, 100, PAGE, 2 * PAGE])
def test_truncated_files_are_refused(tmp_path: Path, direct: bool, size: int) -> None:
    (tmp_path / "x").write_bytes(bytes(size))
    with DirectFile(tmp_path / "x", "read", direct=direct) as file:
        with pytest.raises(FormatError, match=rf"of {3 * PAGE} bytes at offset 0: the file is truncated"):
            file.read_into(aligned_buffer(3 * PAGE), 0, 3 * PAGE)


def test_a_file_system_without_direct_io_is_used_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # every file system here takes O_DIRECT, so the flag is replaced by one that open() refuses with EINVAL
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY | os.O_CREAT)
    monkeypatch.setattr(directio, "_REFUSED_ON", set())
    data, buffer = _data(PAGE), aligned_buffer(PAGE)
    (tmp_path / "x").write_bytes(data.tobytes())
    with caplog.at_level(logging.WARNING, logger=directio.__name__):
        for _ in range(2):
            with DirectFile(tmp_path / "x", "read") as file:
                assert not file.direct
                file.read_into(buffer, 0, PAGE)
                np.testing.assert_array_equal(buffer, data)
    assert len(caplog.records) == 1 and "refuses O_DIRECT" in caplog.text


def test_missing_files_are_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "x", "read")


def test_a_full_disk_is_found_before_the_work(small_disk: Path) -> None:
    buffer = aligned_buffer(30 << 20)
    with DirectFile(small_disk / "x", "write") as file:
        with pytest.raises(DoesNotFit, match="the disk is full"):
            file.reserve(30 << 20)
        file.truncate(0)
        with pytest.raises(DoesNotFit, match="the disk is full"):
            file.write_from(buffer, 0, 30 << 20)
