"""Cut a graph into chunks for full-graph training, and write down what each reads.

`config` says how, `windows` streams the edges under a memory budget, `partition` assigns nodes to parts and chunks
(`metis` through DGL, `streaming` by LDG or Fennel), `pieces` numbers the rows of a piece and finds its halo, `write`
builds the folder of `penstock.storage.chunks`, and `trace` turns loads of chunks into a trace that the planner and the
packer treat like any other.
"""
