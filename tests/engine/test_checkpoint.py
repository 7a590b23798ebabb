import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from penstock.engine.checkpoint import (
    delete_checkpoints,
    list_checkpoints,
    model_checksum,
    pack_tensors,
    read_checkpoint,
    read_latest,
    write_checkpoint,
)
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.manifest import read_json, write_json


def _write(folder: Path, step: int, keep: int = 3) -> Path:
    tensors = {"model": {"w": torch.full((4, 3), float(step))}, "optimizer": {"0.step": torch.tensor(float(step))}}
    return write_checkpoint(folder, step, {"note": step}, tensors, keep=keep)


def test_round_trip(tmp_path: Path) -> None:
    model = {
        "w": torch.randn(3, 4, dtype=torch.float64),
        "half": torch.randn(5).to(torch.bfloat16),
        "count": torch.tensor(7),
        "transposed": torch.randn(3, 2).T,
    }
    path = write_checkpoint(tmp_path, 12, {"a": [1, 2.5]}, {"model": model, "optimizer": {}}, keep=1)
    assert path.name == "step-000000012"
    found = read_checkpoint(path)
    assert found.step == 12 and found.state == {"a": [1, 2.5]} and found.tensors["optimizer"] == {}
    assert all(torch.equal(found.tensors["model"][key], value) for key, value in model.items())
    assert not list(path.glob("*.pt")) and not list(tmp_path.glob(".*"))


def test_tied_weights_and_equal_bytes() -> None:
    tied = torch.randn(4)
    assert pack_tensors({"a": tied, "b": tied}) == pack_tensors({"b": tied.clone(), "a": tied.clone()})
    model = nn.Linear(3, 2)
    before = model_checksum(model)
    assert model_checksum(model) == before
    model.bias.data[0] += 1
    assert model_checksum(model) != before


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (3, 20, 100):
        _write(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000100", "step-000000020"]
    latest = read_latest(tmp_path)
    assert latest is not None and latest.step == 100
    delete_checkpoints(tmp_path)
    assert read_latest(tmp_path) is None and read_latest(tmp_path / "absent") is None


def test_same_step_again_replaces(tmp_path: Path) -> None:
    _write(tmp_path, 5)
    write_checkpoint(tmp_path, 5, {"note": "later"}, {"model": {}}, keep=1)
    latest = read_latest(tmp_path)
    assert latest is not None and latest.state == {"note": "later"} and list(tmp_path.iterdir()) == [latest.path]


def test_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    path = _write(tmp_path, 5)
    path.rename(tmp_path / f".{path.name}.old")
    latest = read_latest(tmp_path)
    assert latest is not None and latest.step == 5


@pytest.mark.parametrize("damage", ["flip", "cut", "drop", "state"])
def test_damaged_one_is_skipped_with_a_warning(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path, 1)
    path = _write(tmp_path, 2)
    file = path / ("state.json" if damage == "state" else "model.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "drop":
        file.unlink()
    else:
        data[-1] ^= 1
        file.write_bytes(data[:-5] if damage in ("cut", "state") else data)
    with caplog.at_level(logging.WARNING):
        latest = read_latest(tmp_path)
    assert latest is not None and latest.step == 1
    assert str(path) in caplog.text


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    (_write(tmp_path, 1) / "model.safetensors").write_bytes(b"")
    with pytest.raises(FormatError, match=r"no checkpoint in .* is intact .*; delete .* to train from the start"):
        read_latest(tmp_path)


def test_other_version_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, 1) / "state.json"
    write_json(path, read_json(path) | {"version": 99})
    with pytest.raises(FormatError, match="99|version"):
        read_checkpoint(path.parent)


def test_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small tmpfs here")
    try:
        small = {"model": {"w": torch.ones(1000)}}
        write_checkpoint(disk, 1, {}, small, keep=1)
        with pytest.raises(DoesNotFit, match="disk is full"):
            write_checkpoint(disk, 2, {}, {"model": {"w": torch.ones(10**6)}}, keep=1)
        latest = read_latest(disk)
        assert latest is not None and latest.step == 1 and [p.name for p in disk.iterdir()] == ["step-000000001"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
