"""What counts as a user's code: what was written by the same hand, without comments and layout."""

import importlib
import sys
from pathlib import Path

import pytest

from penstock.engine.models import GraphModel
from penstock.engine.usermodule import load_class
from penstock.engine.usersource import Sources, differing, sources_of

NET = """
import json, numpy, torch
from torch import nn
import own_tools
from own_parts.blocks import Half

class Net(Half):
    def forward(self, x):
        return own_tools.twice(x)
"""
FILES = {
    "own_net.py": NET,
    "own_tools.py": "import own_deep\nfrom penstock.engine.layers import SAGEConv\ndef twice(x):\n    return 2 * x\n",
    "own_deep.py": "DEEP = 1\n",
    "own_unused.py": "UNUSED = 1\n",
    "own_parts/__init__.py": "",
    "own_parts/blocks.py": "from torch import nn\nclass Half(nn.Module):\n    pass\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_parts").mkdir()
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def _sources() -> Sources:
    """Of the class, imported anew."""
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    return sources_of(load_class("own_net:Net"))


def test_code_of_the_same_hand_counts_and_nothing_else(folder: Path) -> None:
    before = _sources()
    assert list(before) == ["own_deep", "own_net", "own_parts.blocks", "own_tools"]
    assert sources_of(GraphModel) == {}
    for name, changed in (("own_deep", "own_deep.py"), ("own_parts.blocks", "own_parts/blocks.py")):
        (folder / changed).write_text(FILES[changed] + "CHANGED = 1\n")
        assert differing(before, _sources()) == [name]
        (folder / changed).write_text(FILES[changed])
    (folder / "own_unused.py").write_text("UNUSED = 2\n")
    (folder / "own_net.py").write_text(NET.replace("2 * x", "2*x  # a remark") + "\n\n# another\n")
    assert _sources() == before
    (folder / "own_net.py").write_text(NET.replace("import own_tools", "import own_tools, own_unused"))
    assert differing(before, _sources()) == ["own_net", "own_unused"]


def test_code_is_what_was_imported_whatever_its_file_is_by_now(folder: Path) -> None:
    before = _sources()
    (folder / "own_deep.py").write_text("DEEP = 2\n")
    assert sources_of(load_class("own_net:Net")) == before
    assert differing(before, _sources()) == ["own_deep"]
