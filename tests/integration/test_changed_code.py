"""A user's code that changes under its name: told when a run goes on, is done already, or predicts."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from penstock.config import RunConfig, load_config
from penstock.inference import infer
from penstock.storage.budget import MIB
from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.training import train

Configure = Callable[..., RunConfig]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """A function that makes a configuration of the run in `tmp_path/run`; dots in keys are written `__`."""
    sizes = GenerateConfig(num_nodes=200, num_features=8, train=0.3, valid=0.2)
    generate_graph(tmp_path / "graph", sizes, host_memory=32 * MIB)

    def made(**flags: Any) -> RunConfig:
        shape: dict[str, Any] = {"dataset": tmp_path / "graph", "run_dir": tmp_path / "run", "train.epochs": 2}
        given = {key.replace("__", "."): value for key, value in flags.items()}
        if "mode" not in given:
            shape |= {"sampler.fanouts": (3, 3), "sampler.batch_size": 30}
        return load_config(flags={**shape, "budgets.host_memory": "16MiB", "model.kind": "custom", **given})

    return made


NET = """
import torch
from torch import nn
import scale_of_mine

class Net(nn.Module):
    def __init__(self, num_features, num_classes):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in ((num_features, 8), (8, num_classes)))

    def layer_forward(self, layer, block, x):
        return self.layers[layer](scale_of_mine.scaled(x[: block.num_dst]))

    def forward(self, blocks, x):
        for layer, block in enumerate(blocks):
            x = self.layer_forward(layer, block, x)
        return x
"""


def test_other_code_under_the_same_name_is_told_and_trains_anew_where_that_is_asked_for(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(scale: str) -> None:
        (tmp_path / "net_of_mine.py").write_text(NET)
        (tmp_path / "scale_of_mine.py").write_text(f"def scaled(x):\n    return {scale}\n")
        for name in ("net_of_mine", "scale_of_mine"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()

    def told(words: str) -> bool:
        found = [record.message for record in caplog.records if "the code of scale_of_mine changed" in record.message]
        caplog.clear()
        return len(found) == 1 and words in found[0] if words else not found

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write("x")
    module = {"model__module": "net_of_mine:Net"}
    shorter, longer = configure(**module, train__epochs=1), configure(**module)
    first = train(shorter)
    assert list(first["identity"]["model.source"]) == ["net_of_mine", "scale_of_mine"]
    write("x  # as it is")
    assert train(shorter)["already_done"] and told("")
    write("x + 1")
    assert train(shorter)["already_done"] and told("its result is of the code before. To train anew with it: --resume")
    assert train(longer)["metrics"]["epochs"] == 2 and told("training goes on with the code as it is now")
    infer(longer.run_dir, tmp_path / "out.parquet")
    assert told("")
    write("x + 2")
    infer(longer.run_dir, tmp_path / "out.parquet")
    assert told("predictions are of the code as it is now")
    assert "already_done" not in train(longer, if_changed=True) and told("training anew")
    write("x + 3")
    anew = train(longer, resume=False)
    assert told("") and anew["identity"]["model.source"] != first["identity"]["model.source"]
    assert train(longer)["already_done"] and told("")


@pytest.mark.slow
def test_full_graph_training_tells_other_code_too(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = Path(__file__).parent.parent.parent / "examples" / "deep_custom_model.py"
    (tmp_path / "deep_of_mine.py").write_text(source.read_text())
    monkeypatch.syspath_prepend(tmp_path)
    config = configure(mode="chunked", chunked__chunks=2, model__module="deep_of_mine:DeepNet")
    train(config)
    (tmp_path / "deep_of_mine.py").write_text(source.read_text() + "\nCHANGED = 1\n")
    del sys.modules["deep_of_mine"]
    assert train(config)["already_done"] and "the code of deep_of_mine changed since" in caplog.text
    assert train(config.model_copy(update={"train": config.train.model_copy(update={"epochs": 3})}))["status"] == "ok"
