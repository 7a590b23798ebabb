"""Benches run at every scale that they accept."""

import json
from pathlib import Path

import pytest

from penstock.benchmarks.run import run_bench


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [("epoch", "time_vs_memory"), ("pack", "bandwidth")])
def test_the_least_scale(name: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(name, scale=0.002, repeats=1, directory=tmp_path, as_json=True)
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["case"] == case and first["ours"] > 0 and first["peer"] > 0
