"""METIS (Karypis and Kumar, SIAM J. Sci. Comput. 20(1), 1998) as DGL ships it, in a process of its own.

DGL takes 250 MiB and two seconds to import, prints to stdout and stderr, and keeps what METIS allocated; none of that
may happen to a trainer. The graph is made symmetric, so an edge counts from both ends; self loops do not count.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile

import numpy as np
from numpy.typing import NDArray

from penstock.storage.budget import MIB
from penstock.storage.graph import GraphStore, open_graph
from penstock.storage.lifeline import end_with

# Peak of the process over random graphs of 1 to 4 million edges, which symmetry doubles: 145 bytes an edge, 116 a node;
# torch and DGL took 361 MiB.
_EDGE_BYTES, _NODE_BYTES, _IMPORT_BYTES = 160, 128, 376 * MIB

# Few bins are cut better by bisection (its manual says up to 8), and METIS's k-way cut in two differs between runs.
_RECURSIVE = 8


def metis_bytes(graph: GraphStore) -> int:
    """Estimate the memory that METIS takes."""
    return _EDGE_BYTES * graph.num_edges + _NODE_BYTES * graph.num_nodes + _IMPORT_BYTES


def metis_peak_bytes(graph: GraphStore) -> int:
    """What its process takes at its largest, without a margin."""
    return 145 * graph.num_edges + 116 * graph.num_nodes + _IMPORT_BYTES


def can_import_dgl() -> bool:
    """Whether DGL is installed; it is not imported."""
    return importlib.util.find_spec("dgl") is not None


def run_metis(graph: GraphStore, groups: NDArray[np.int32], num_bins: int, threads: int = 1) -> NDArray[np.int32]:
    """Cut every group of nodes into `num_bins` of about equal size, int32 [N]. RuntimeError where METIS fails."""
    module = "penstock.sampler.chunking.metis"
    command = [sys.executable, "-m", module, str(graph.path), str(num_bins), str(os.getpid())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    # files without a name: nothing is left of them, however either process ends
    with tempfile.TemporaryFile(buffering=0) as given, tempfile.TemporaryFile(buffering=0) as found:
        np.save(given, groups)
        given.seek(0)
        done = subprocess.run(command, stdin=given, stdout=found, stderr=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(
                f"METIS failed on {graph.path}, exit code {done.returncode}: {done.stderr.strip()[-2000:]}; "
                "use method ldg"
            )
        found.seek(0)
        labels: NDArray[np.int32] = np.load(found)
    return labels


def _cut_group(
    graph: GraphStore, nodes: NDArray[np.int64], local: NDArray[np.int64], num_bins: int
) -> NDArray[np.int32]:
    """Bins of the nodes of a group; `local` int64 [N] numbers them and is -1 elsewhere."""
    import dgl
    import torch

    starts, counts = graph.indptr[nodes], graph.indptr[nodes + 1] - graph.indptr[nodes]
    destinations = np.repeat(np.arange(len(nodes)), counts)
    offsets = np.cumsum(counts) - counts
    sources = local[graph.indices[np.repeat(starts - offsets, counts) + np.arange(len(destinations))]]
    inside = (sources >= 0) & (sources != destinations)
    if not inside.any():
        return (np.arange(len(nodes)) * num_bins // len(nodes)).astype(np.int32)
    kept = np.concatenate([[0], np.cumsum(inside)])
    indptr = kept[np.concatenate([offsets, [len(destinations)]])]
    csc = torch.from_numpy(indptr), torch.from_numpy(sources[inside]), torch.empty(0, dtype=torch.int64)
    graph_of_group = dgl.graph(("csc", csc), num_nodes=len(nodes))
    mode = "recursive" if num_bins <= _RECURSIVE else "k-way"
    labels = dgl.metis_partition_assignment(graph_of_group, num_bins, mode=mode)
    return np.asarray(labels.numpy().astype(np.int32))


def main(path: str, num_bins: str, parent: str) -> None:
    """Read groups from stdin and write labels to stdout, as `.npy`; what METIS and DGL print goes to stderr."""
    end_with(int(parent))
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        graph, groups = open_graph(path), np.load(sys.stdin.buffer)
        labels = np.zeros(len(groups), np.int32)
        local = np.full(len(groups), -1, np.int64)
        for group in range(int(groups.max()) + 1):
            nodes = np.flatnonzero(groups == group)
            local[nodes] = np.arange(len(nodes))
            labels[nodes] = _cut_group(graph, nodes, local, int(num_bins))
            local[nodes] = -1
        np.save(out, labels)


if __name__ == "__main__":
    main(*sys.argv[1:])
