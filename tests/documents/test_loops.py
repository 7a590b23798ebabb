"""The programs of docs/loops.md, as they stand there, on a graph of a reader's tables."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import penstock
from tests.documents.blocks import blocks_of
from tests.documents.test_commands import NUM_NODES, write_tables


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tables(tmp_path / "tables")
    monkeypatch.chdir(tmp_path)
    options = penstock.IngestOptions(undirected=True)
    penstock.ingest_parquet("tables/nodes.parquet", "tables/edges.parquet", "papers.graph", options)
    return tmp_path


def run(*programs: str) -> str:
    """Run programs one after the other in one namespace, as cells of a notebook, and return what they print."""
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for program in programs:
            exec(compile(program, "docs/loops.md", "exec"), names)
    return printed.getvalue()


@pytest.mark.slow
def test_pyg(folder: Path) -> None:
    pytest.importorskip("torch_geometric")
    train, use, _ = blocks_of("docs/loops.md", "python")
    assert len(list(filter(None, train.splitlines()))) <= 10 and "import penstock" in train and "penstock." in train
    assert not re.search(r"penstock\.(engine|sampler|storage)|\b_\w", train + use)
    printed = run(train, use)
    assert float(printed.split()[-1]) > 0.6
    assert pq.read_metadata(folder / "scores.parquet").num_rows == NUM_NODES


@pytest.mark.slow
def test_dgl(folder: Path) -> None:
    pytest.importorskip("dgl")
    (program,) = blocks_of("docs/loops.md", "python")[2:]
    assert len(list(filter(None, program.splitlines()))) <= 10
    assert float(run(program + "print(loss.item())")) < 1.2  # of four classes, untrained: 1.39
