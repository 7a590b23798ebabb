"""Two folders of one disk have the same rates; what is remembered of a disk may be lost or damaged."""

import json
import time
from pathlib import Path

from penstock.disk_rates import disk_rates, measure_anew


def test_folders_of_one_disk_have_one_rate(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "disks.json"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = disk_rates(tmp_path / "a", cache)
    assert disk_rates(tmp_path / "b", cache) == first
    (known,) = json.loads(cache.read_text()).values()
    known["rates"]["read_bytes_per_s"] = 12345.0
    (key,) = json.loads(cache.read_text())
    cache.write_text(json.dumps({key: known}))
    assert disk_rates(tmp_path / "a", cache).read_bytes_per_s == 12345.0
    assert measure_anew(tmp_path / "a", cache).read_bytes_per_s != 12345.0
    assert disk_rates(tmp_path / "b", cache).read_bytes_per_s != 12345.0


def test_what_is_old_or_damaged_is_measured_anew(tmp_path: Path) -> None:
    cache = tmp_path / "disks.json"
    disk_rates(tmp_path, cache)
    (key,) = json.loads(cache.read_text())
    rates = {"read_bytes_per_s": 1.0, "write_bytes_per_s": 1.0, "random_reads_per_s": 1.0}
    for value in ({"at": time.time() - 90_000, "rates": rates}, {"at": time.time(), "rates": {"read": 1.0}}, 7):
        cache.write_text(json.dumps({key: value}))
        assert disk_rates(tmp_path, cache).read_bytes_per_s > 1.0
    cache.write_text("{")
    assert disk_rates(tmp_path, cache).read_bytes_per_s > 1.0


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert disk_rates(tmp_path, tmp_path / "file" / "disks.json").read_bytes_per_s > 0
