"""What `import penstock` offers, and what a type checker knows of it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import penstock

ROOT = Path(__file__).parent.parent
RIGHT = """
import threading
from pathlib import Path
import penstock

penstock.ingest_npy(Path("in"), Path("out"), penstock.IngestOptions(undirected=True), host_memory=1 << 30)
config: penstock.RunConfig = penstock.load_config(flags={"dataset": "g", "run_dir": "r", "train.lr": 0.1})
result = penstock.train(config, resume=False, stop_requested=threading.Event())
print(result["metrics"]["test_accuracy"], penstock.infer("r", "out.parquet"), penstock.__version__)
graph: penstock.GraphStore = penstock.open_graph("out")
penstock.ingest_parquet("nodes.parquet", ["a.parquet", Path("b.parquet")], "out", host_memory="4GiB")


def tell(record: penstock.EpochRecord) -> None:
    print(record.epoch, record.loss, record.valid and record.valid.accuracy, record.left_s)


penstock.train(config, progress=True, on_epoch=tell)
with penstock.open_feed("out", "feeds", num_neighbors=[10, 5], host_memory="1GiB") as loader:
    for batch in loader:
        print(batch.features.shape, len(loader))
    parts = ((batch.seeds, {"degree": batch.blocks[-1].indptr.diff()}) for batch in loader)
    print(penstock.write_nodes(graph, "out.parquet", parts) + 1)
penstock.infer("r", "out.parquet", sampled=True, fanouts=[5, 5], disk="1GiB")
print(graph.meta.num_nodes + 1)
"""
WRONG = """
import penstock
penstock.trian("g")
penstock.train("runs/one")
penstock.train(penstock.load_config(), ressume=False)
penstock.open_graph(Path("g")).meta.num_node
penstock.ModelConfig(hidden=[])
x: int = penstock.open_trace(Path("t"))
""".replace("import penstock", "from pathlib import Path\nimport penstock")


def check(tmp_path: Path, text: str) -> list[str]:
    """The errors that mypy finds in a program of a user, strictly, with Penstock as it is installed."""
    program = tmp_path / "program.py"
    program.write_text(text)
    options = [
        "--strict",
        "--no-error-summary",
        "--follow-imports=silent",
        "--cache-dir",
        str(ROOT / ".mypy_cache" / "api"),
    ]
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *options, str(program)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.stderr == "" and ended.returncode in (0, 1), ended.stderr
    return [line for line in ended.stdout.splitlines() if ": error:" in line]


@pytest.mark.slow  # mypy reads all of torch's types where it has no cache
def test_a_type_checker_knows_the_api(tmp_path: Path) -> None:
    assert check(tmp_path, RIGHT) == []
    found = check(tmp_path, WRONG)
    said = ["[attr-defined]", "[arg-type]", "[call-arg]", "[attr-defined]", "[arg-type]", "[assignment]"]
    assert [line.rpartition("  ")[2] for line in found] == said, found


def test_what_checkers_see_is_what_there_is() -> None:
    tree = ast.parse((ROOT / "src" / "penstock" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and isinstance(node.test, ast.Name)]
    seen = {
        (alias.asname, node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert seen == set(penstock._HOMES.items())


def test_every_name_is_there_and_others_are_refused_with_what_there_is() -> None:
    for name in penstock.__all__:
        assert getattr(penstock, name) is not None
    assert {"train", "infer"} <= set(dir(penstock))
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has .*train"):
        penstock.trian  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("imports", "given", "found"),
    [
        ("penstock", None, "PASSIVE"),
        ("penstock", "ACTIVE", "ACTIVE"),
        ("torch, penstock", None, "None"),  # too late: it would be said and not be so
    ],
)
def test_threads_that_wait_sleep_unless_told_otherwise(imports: str, given: str | None, found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    program = f"import os, {imports}; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]
