"""Fixtures that several folders share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from penstock.storage.generate import GenerateConfig, generate_graph
from penstock.storage.graph import GraphStore

# the first call of a kernel compiles it, which no deadline survives
settings.register_profile("penstock", deadline=None)
settings.load_profile("penstock")


@pytest.fixture(scope="session")
def tiny_graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """A seeded power-law graph: 400 nodes, about 2800 edges, 20 float32 features, 4 classes, splits."""
    config = GenerateConfig(
        num_nodes=400, avg_degree=7, num_features=20, num_classes=4, train=0.4, valid=0.2, test=0.3, seed=7
    )
    return generate_graph(tmp_path_factory.mktemp("tiny") / "graph", config, host_memory=64 << 20)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the real graphs `cora` and `facebook`, named by PENSTOCK_DATA."""
    path = os.environ.get("PENSTOCK_DATA")
    if not path or not Path(path).is_dir():
        pytest.skip("set PENSTOCK_DATA to the folder that holds cora/ and facebook/")
    return Path(path)
