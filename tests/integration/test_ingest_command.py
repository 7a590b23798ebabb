"""`penstock ingest` as a user meets it: what it says of folders that are no source, and what `--help` promises."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from penstock.__main__ import app
from penstock.data_verbs import run_ingest
from penstock.storage.errors import DataError
from penstock.storage.graph import open_graph
from penstock.storage.ingest import IngestOptions


def _tables(folder: Path, nodes: str = "nodes.parquet", edges: str = "edges.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": range(4), "feature": [[1.0, 2.0]] * 4}), folder / nodes)
    pq.write_table(pa.table({"src": [0, 1], "dst": [1, 2]}), folder / edges)
    return folder


def call(*words: str) -> None:
    app(list(words), exit_on_error=False, print_error=True, result_action="return_value")


def ingest(source: Path | str, *options: str) -> None:
    call("ingest", str(source), *options, "--quiet")


def test_what_a_folder_has_instead_is_said(tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "nodes.csv").write_text("id,feature\n")
    with pytest.raises(
        DataError, match=r"csv has no nodes.parquet; it has \['nodes.csv'\]; formats are Parquet .*NumPy"
    ):
        ingest(tmp_path / "csv", str(tmp_path / "g"))
    half = _tables(tmp_path / "half", edges="links.parquet")
    with pytest.raises(DataError, match=r"half has no edges.parquet; .*links.parquet.*give --edges"):
        ingest(half, str(tmp_path / "g"))
    ingest(half, str(tmp_path / "g"), "--edges", str(half / "links.parquet"))  # the remedy
    assert open_graph(tmp_path / "g").num_edges == 2
    with pytest.raises(DataError, match="has no edges.parquet; it has no entries: it is a file"):
        ingest(half / "links.parquet", str(tmp_path / "h"), "--nodes", str(half / "nodes.parquet"))
    with pytest.raises(DataError, match="halff does not exist; did you mean .*half?"):
        ingest(tmp_path / "halff", str(tmp_path / "h"))
    with pytest.raises(ValueError, match="--nodes and --edges name Parquet tables, and --format is npy"):
        ingest(half, str(tmp_path / "h"), "--format", "npy", "--edges", "x")


def test_tables_beside_a_raw_folder_are_tables(tmp_path: Path) -> None:
    folder = _tables(tmp_path / "in")
    (folder / "raw").mkdir()
    ingest(folder, str(tmp_path / "g"))
    assert open_graph(tmp_path / "g").meta.source == "parquet"


def test_tables_may_be_patterns(tmp_path: Path) -> None:
    tables = _tables(tmp_path / "tables")
    whole = pq.read_table(tables / "nodes.parquet")
    (tmp_path / "parts").mkdir()
    for n, lo in enumerate(range(0, whole.num_rows, 2)):
        pq.write_table(whole.slice(lo, 2), tmp_path / "parts" / f"nodes-{n}.parquet")
    pq.write_table(whole, tmp_path / "parts" / "other.parquet")
    ingest(tables, str(tmp_path / "g"), "--nodes", f"{tmp_path}/parts/nodes-*.parquet")
    assert open_graph(tmp_path / "g").num_nodes == whole.num_rows
    with pytest.raises(DataError, match=r"no file matches .*edges-\*; write a pattern like"):
        ingest(tables, str(tmp_path / "h"), "--edges", f"{tmp_path}/parts/edges-*")


def test_a_remote_source_is_said_to_be_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="s3://bucket/tables is remote, and tables are read from local folders"):
        ingest("s3://bucket/tables", str(tmp_path / "g"))
    with pytest.raises(DataError, match="gs://b/e.parquet is remote"):
        ingest(_tables(tmp_path / "t"), str(tmp_path / "g"), "--edges", "gs://b/e.parquet")
    ingest(f"file://{tmp_path / 't'}", str(tmp_path / "g"))  # local after all
    assert open_graph(tmp_path / "g").num_nodes == 4


def test_the_remedy_for_a_remote_source_works(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    uri = f"local://{_tables(tmp_path / 'far')}"
    with pytest.raises(DataError, match="is remote") as caught:
        ingest(uri, str(tmp_path / "g"))
    words = shlex.split(str(caught.value).split("copy them first: ")[1])
    assert words[:2] == ["python", "-c"]
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True)
    ingest(tmp_path / "tables", str(tmp_path / "g"))
    assert open_graph(tmp_path / "g").num_nodes == 4


def test_all_options_are_listed_with_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    call("ingest", "--help")
    assert "--ingest-options" in capsys.readouterr().out
    call("inspect", "--ingest-options")
    listed = capsys.readouterr().out
    call("inspect", "--ingest-options", "--json")
    as_json = json.loads(capsys.readouterr().out)
    assert set(as_json) == set(IngestOptions.model_fields)
    for name, option in as_json.items():
        assert f"{name}=" in listed and option["help"] in listed
    assert as_json["feature_norm"]["choices"] == ["none", "row", "standard"]
    with pytest.raises(ValueError, match="give the folder to inspect, or --ingest-options"):
        call("inspect")


def test_every_option_is_in_the_documents() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"
    assert [name for name in IngestOptions.model_fields if f"`{name}`" not in docs.read_text()] == []


def test_a_store_that_is_there_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _tables(tmp_path / "tables")
    makers = (("ingest", str(source), str(tmp_path / "a")), ("generate", str(tmp_path / "b"), "--num-nodes", "500"))
    for words in makers:
        call(*words)
        assert "already done" not in capsys.readouterr().out
        call(*words)
        assert "already done" in capsys.readouterr().out


def test_options_reach_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "npy"
    folder.mkdir()
    arrays = {"features": np.ones((4, 2)), "src": np.array([0]), "dst": np.array([1]), "labels": np.array(list("abba"))}
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    run_ingest(
        folder,
        tmp_path / "g",
        format="auto",
        nodes=None,
        edges=None,
        options=["feature_norm=row", "remap_labels=true", "split_fractions=[0.5,0.25,0.25]"],
        host_memory="64MiB",
        quiet=True,
    )
    store = open_graph(tmp_path / "g")
    assert store.class_values == ["a", "b"] and np.unique(store.features).tolist() == [0.5]


def test_a_mistyped_path_is_said_to_be_one(tmp_path: Path) -> None:
    ingest(_tables(tmp_path / "tables"), str(tmp_path / "graph"))
    with pytest.raises(DataError, match=r"grpah does not exist; did you mean .*graph\?"):
        open_graph(tmp_path / "grpah")
    with pytest.raises(DataError, match=r"grpah does not exist; did you mean .*graph\?"):
        call("inspect", str(tmp_path / "grpah"))
    with pytest.raises(DataError, match="nowhere does not exist; check the path"):
        call("infer", str(tmp_path / "nowhere"), str(tmp_path / "out.parquet"))
    with pytest.raises(DataError, match="manifest.json does not exist: the folder is not complete, or none of ours"):
        open_graph(tmp_path / "tables")


def test_a_file_is_not_taken_for_the_folder_it_is_in(tmp_path: Path) -> None:
    ingest(_tables(tmp_path / "tables"), str(tmp_path / "graph"))
    manifest, out = tmp_path / "graph" / "manifest.json", str(tmp_path / "out.parquet")
    for verb, *options in (("plan", "--run-dir", str(tmp_path / "r")), ("inspect",)):
        with pytest.raises(DataError, match=rf"manifest.json is a file; give a folder .*: {tmp_path / 'graph'}$"):
            call(verb, str(manifest), *options)
    with pytest.raises(DataError, match=r"manifest.json is a file; give a folder that has config.yaml$"):
        call("infer", str(manifest), out)
    with pytest.raises(DataError, match=r"graph has no config.yaml: it is no run"):
        call("infer", str(tmp_path / "graph"), out)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "run" / "model" / "model.json").touch()
    with pytest.raises(DataError, match=rf"model.json is a file; give a folder that has config.yaml: {tmp_path}/run$"):
        call("infer", str(tmp_path / "run" / "model" / "model.json"), out)
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"link does not exist; it is a link to .*/gone, which is not there"):
        call("inspect", str(tmp_path / "link"))


@pytest.mark.parametrize("out", ["out.csv", "out.parquet.gz", "file:///nowhere/out.json"])
def test_a_file_of_another_format_is_refused_before_any_work(tmp_path: Path, out: str) -> None:
    with pytest.raises(ValueError, match=r"would be a Parquet file named \.(csv|gz|json); give a name .*\.parquet"):
        call("infer", str(tmp_path / "run"), out if ":" in out else str(tmp_path / out))
    assert not list(tmp_path.iterdir())
