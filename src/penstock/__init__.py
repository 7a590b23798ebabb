"""Out-of-core GNN training.

The public API, loaded when it is used, so that `import penstock` costs nothing:

`ingest_parquet`, `ingest_npy`, `ingest_ogb`, `ingest_dgl`, `ingest_pyg`, `generate_graph`, `open_graph` make and open
graph stores; `load_config`, `train`, `infer` run the main job; `sample_trace`, `plan_packs`, `write_packs`,
`open_pack_feed`, `open_memory_feed` are its steps, for pipelines of your own.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GenerateConfig": "penstock.storage.generate",
    "GraphStore": "penstock.storage.graph",
    "IngestOptions": "penstock.storage.ingest",
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
    "open_graph": "penstock.storage.graph",
    "open_memory_feed": "penstock.engine.memory_feed",
    "open_pack_feed": "penstock.engine.feed",
    "open_trace": "penstock.storage.trace",
    "plan_packs": "penstock.sampler.plan",
    "sample_trace": "penstock.sampler.neighbors",
    "train": "penstock.training",
    "write_packs": "penstock.sampler.packer",
}
__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
