"""Ranks of full-graph training read the graph and the run folder where they are: whether all nodes see them.

Asked before any work, of the nodes that there are, and again of those that ranks were placed on: an autoscaler may have
started some since.
"""

import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from penstock.cluster.nodes import ask_nodes, node_names
from penstock.cluster.session import alive_nodes, open_session

_ANSWER_S = 60.0  # for a node that starts a process first


def missing_paths(paths: Sequence[str]) -> list[str]:
    """Which paths are not here; runs on nodes."""
    return [path for path in paths if not Path(path).exists()]


@contextmanager
def _marked(folder: Path) -> Iterator[Path]:
    """A file that nobody else has: a folder of the same name may be on every node."""
    marker = folder / f".seen-{secrets.token_hex(8)}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


def require_seen(graph: Path, folder: Path, nodes: Collection[str]) -> None:
    """ValueError that names nodes, by id, which do not see this process's graph or folder. Those that do not answer
    are left to the failure policy."""
    with _marked(folder.absolute()) as marker:
        wanted = {str(graph.absolute() / "manifest.json"): graph, str(marker): folder}
        found = ask_nodes(missing_paths, dict.fromkeys(nodes, (list(wanted),)), _ANSWER_S)
    blind = {node: [str(wanted[path]) for path in paths] for node, paths in found.items() if paths}
    if blind:
        raise ValueError(_explain(blind, node_names()))


def _explain(blind: Mapping[str, Sequence[str]], names: Mapping[str, str]) -> str:
    told = "; ".join(f"{names.get(node, node)} lacks {' and '.join(paths)}" for node, paths in sorted(blind.items()))
    return (
        f"mode=chunked: ranks read the graph and the run folder, and not all nodes have the files of this one: {told}. "
        "Put both on a file system that all nodes mount under the same path (of a URI each node would have its own "
        "copy), or bind ranks to nodes that have it by cluster.replica_resources"
    )


def require_shared(
    graph: Path, folder: Path, *, address: str | None, resources: Mapping[str, float], num_cpus: int
) -> None:
    """`require_seen` for all nodes of the cluster at `address` that ranks may go to."""
    with open_session(address, folder, num_cpus=num_cpus):
        nodes = [node.node_id for node in alive_nodes() if node.cpus >= 1 and node.has(resources)]
        require_seen(graph, folder, nodes)
