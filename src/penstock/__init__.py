"""Out-of-core GNN training.

The public API, loaded when it is used, so that `import penstock` costs nothing:

`ingest_parquet`, `ingest_npy`, `ingest_ogb`, `ingest_dgl`, `ingest_pyg`, `generate_graph`, `open_graph` make and open
graph stores; `load_config`, `train`, `infer`, `load_model` run the main job; `open_feed` and `write_nodes` serve loops
of your own; `sample_trace`, `plan_packs`, `write_packs`, `open_pack_feed`, `open_memory_feed` are its steps one by one,
for pipelines. Paths may be text, and so may sizes, like `host_memory="4GiB"`. Each function has a help of its own.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING

# torch reads it once, when it is loaded: see "Threads that wait sleep" in docs/decisions.md
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:  # for type checkers, which do not run `__getattr__`; a test compares the two lists
    from penstock.config import RunConfig as RunConfig
    from penstock.config import load_config as load_config
    from penstock.engine.feed import open_pack_feed as open_pack_feed
    from penstock.engine.memory_feed import open_memory_feed as open_memory_feed
    from penstock.engine.minibatch import MiniBatch as MiniBatch
    from penstock.engine.modelfile import load_model as load_model
    from penstock.engine.models import ModelConfig as ModelConfig
    from penstock.engine.trainer import TrainConfig as TrainConfig
    from penstock.epochs import EpochRecord as EpochRecord
    from penstock.inference import infer as infer
    from penstock.loader import Loader as Loader
    from penstock.loader import open_feed as open_feed
    from penstock.sampler.neighbors import SampleConfig as SampleConfig
    from penstock.sampler.neighbors import sample_trace as sample_trace
    from penstock.sampler.packer import write_packs as write_packs
    from penstock.sampler.plan import PlanConfig as PlanConfig
    from penstock.sampler.plan import plan_packs as plan_packs
    from penstock.storage.budget import Budgets as Budgets
    from penstock.storage.generate import GenerateConfig as GenerateConfig
    from penstock.storage.generate import generate_graph as generate_graph
    from penstock.storage.graph import GraphStore as GraphStore
    from penstock.storage.graph import open_graph as open_graph
    from penstock.storage.ingest import IngestOptions as IngestOptions
    from penstock.storage.ingest import ingest_dgl as ingest_dgl
    from penstock.storage.ingest import ingest_npy as ingest_npy
    from penstock.storage.ingest import ingest_ogb as ingest_ogb
    from penstock.storage.ingest import ingest_parquet as ingest_parquet
    from penstock.storage.ingest import ingest_pyg as ingest_pyg
    from penstock.storage.trace import open_trace as open_trace
    from penstock.tables import write_nodes as write_nodes
    from penstock.training import train as train
    from penstock.watching import show_progress as show_progress

__version__ = "0.1.0"

_HOMES = {
    "Budgets": "penstock.storage.budget",
    "EpochRecord": "penstock.epochs",
    "GenerateConfig": "penstock.storage.generate",
    "GraphStore": "penstock.storage.graph",
    "IngestOptions": "penstock.storage.ingest",
    "Loader": "penstock.loader",
    "MiniBatch": "penstock.engine.minibatch",
    "ModelConfig": "penstock.engine.models",
    "PlanConfig": "penstock.sampler.plan",
    "RunConfig": "penstock.config",
    "SampleConfig": "penstock.sampler.neighbors",
    "TrainConfig": "penstock.engine.trainer",
    "generate_graph": "penstock.storage.generate",
    "infer": "penstock.inference",
    "ingest_dgl": "penstock.storage.ingest",
    "ingest_npy": "penstock.storage.ingest",
    "ingest_ogb": "penstock.storage.ingest",
    "ingest_parquet": "penstock.storage.ingest",
    "ingest_pyg": "penstock.storage.ingest",
    "load_config": "penstock.config",
    "load_model": "penstock.engine.modelfile",
    "open_feed": "penstock.loader",
    "open_graph": "penstock.storage.graph",
    "open_memory_feed": "penstock.engine.memory_feed",
    "open_pack_feed": "penstock.engine.feed",
    "open_trace": "penstock.storage.trace",
    "plan_packs": "penstock.sampler.plan",
    "sample_trace": "penstock.sampler.neighbors",
    "show_progress": "penstock.watching",
    "train": "penstock.training",
    "write_nodes": "penstock.tables",
    "write_packs": "penstock.sampler.packer",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604

if not TYPE_CHECKING:  # a checker that sees it takes any name for one of ours

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'penstock' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
