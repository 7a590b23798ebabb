"""Benches run at every scale that they accept."""

import json
from importlib import util
from pathlib import Path

import pytest

from penstock.benchmarks.run import run_bench

DGL = pytest.mark.skipif(util.find_spec("dgl") is None, reason="DGL, the peer, is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("epoch", "time_vs_memory"),
        ("pack", "bandwidth"),
        ("feed", "bandwidth"),
        ("policies", "static_tier_0.05"),
        ("cluster", "two_replicas"),
        ("memory", "quickstart"),
        pytest.param("sample", "edges_per_core", marks=DGL),
        pytest.param("kernels", "mean_forward", marks=DGL),
    ],
)
def test_the_least_scale(name: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_bench(name, scale=0.002, repeats=1, directory=tmp_path, form="json", quiet=True)
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["case"] == case and first["ours"] > 0 and first["peer"] > 0
