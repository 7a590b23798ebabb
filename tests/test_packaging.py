"""The top-level folders are the packages, through links, and under one name only."""

import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("engine", "storage", "sampler", "kernels", "cluster", "benchmarks")


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder_is_linked_into_the_package(folder: str) -> None:
    link = ROOT / "src" / "penstock" / folder
    assert link.is_symlink()
    assert link.resolve() == ROOT / folder
    assert (ROOT / folder / "__init__.py").is_file()


def test_nothing_is_imported_under_its_bare_folder_name() -> None:
    code = "import penstock.storage.graph, penstock.kernels.rng, sys; print(sorted(sys.modules))"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'penstock.storage.graph'" in modules
    assert not [folder for folder in FOLDERS if f"'{folder}'" in modules]


def test_top_level_is_penstock_alone() -> None:
    assert (distribution("penstock").read_text("top_level.txt") or "").split() == ["penstock"]


def test_importing_penstock_loads_no_heavy_library() -> None:
    heavy = ("torch", "numba", "ray", "dgl", "pyarrow")
    code = f"import penstock, penstock.__main__, sys; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
