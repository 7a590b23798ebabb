"""Formats and bytes: what lies on disk, how it is read, written, checked and held in memory.

A dataset, a trace and a pack set are folders whose manifest is written last; without it they do not exist.
`graph` is the graph store, `ingest` fills it, `trace` holds sampled items, `pack` holds what a trainer reads.
`directio` moves aligned bytes between disk and reused buffers; `tiers` keeps rows in host memory.
Sampler and engine meet here and nowhere else.
"""
