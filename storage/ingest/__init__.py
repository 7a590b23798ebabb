"""Ingest: from the user's tables to a graph store, under a memory budget.

A *source* (Parquet, NumPy, OGB, DGL, PyG) is read front to back as chunks of nodes and of edges. Ids are mapped to
dense ones, features are checked and encoded, edges are spread over files by destination and sorted file by file.
Nothing needs the features or the edges in memory, and a run that was killed continues where it was.
`compose` has the steps, `spill` the external sort.
"""

from penstock.storage.ingest.entry import ingest_dgl, ingest_npy, ingest_ogb, ingest_parquet, ingest_pyg
from penstock.storage.ingest.options import IngestOptions

__all__ = ["IngestOptions", "ingest_dgl", "ingest_npy", "ingest_ogb", "ingest_parquet", "ingest_pyg"]
