"""Full-graph training: layers in a pipeline over graph chunks, with historical embeddings.

`config` says how, `schedule` lists the actions of every rank, `validate` proves a list sound, `simulate` predicts it,
`stage` computes a chunk's layers forward and backward, `rank` runs a list over a `transport`, and `trainer` drives
ranks in threads or processes (on Ray: `penstock.cluster`). The algorithm is GNNPipe's (Chen et al., arXiv 2308.10087)
with other gradient modes; docs/decisions.md says what differs and why.
"""
