"""The nodes of a cluster: how people call them, whether they are there, and short tasks on them."""

import contextlib
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from penstock.cluster.head import ask

_POLL_S = 0.05
_KILL_S = 1.0  # for processes that Ray has told to end; those that a signal stopped do not hear it


def node_names() -> dict[str, str]:
    """What people call the nodes, like `10.0.0.3 (worker-a)`, by node id."""
    return {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})" for node in ask(ray.nodes)}


def is_lost(node_id: str) -> bool:
    """Whether a node is no more. Its raylet is asked, since Ray itself takes a quarter of a minute to be sure."""
    found = [node for node in ask(ray.nodes) if node["NodeID"] == node_id]
    if not found or not found[0]["Alive"]:
        return True
    try:
        address = found[0]["NodeManagerAddress"], found[0]["NodeManagerPort"]
        socket.create_connection(address, timeout=1.0).close()
    except OSError:
        return True
    return False


def ask_nodes(
    function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], timeout_s: float
) -> dict[str, Any]:
    """Call a function on nodes; answers by node id, of those that gave one in time."""
    return ask(lambda: _ask_nodes(function, arguments, timeout_s)) if arguments else {}


def _ask_nodes(
    function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], timeout_s: float
) -> dict[str, Any]:
    task = ray.remote(function)
    refs = {
        node_id: task.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False)
        ).remote(*given)
        for node_id, given in arguments.items()
    }
    ready, late = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
    for ref in late:
        ray.cancel(ref, force=True)
    answers = {}
    for node_id, ref in refs.items():
        if ref in ready:
            with contextlib.suppress(RayError):  # the node went away meanwhile
                answers[node_id] = ray.get(ref)
    return answers


def end_actors(pids: Sequence[int], patience_s: float) -> list[int]:
    """Wait until processes of actors that Ray was told to kill have ended, and help; gives those that have not."""
    began, helped = time.monotonic(), False
    while (left := [pid for pid in pids if psutil.pid_exists(pid)]) and time.monotonic() - began < patience_s:
        if not helped and time.monotonic() - began > _KILL_S:
            helped = True
            for pid in left:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(pid)
                    if "ray::" in " ".join(process.cmdline()):  # not one that has its number now
                        process.kill()
        time.sleep(_POLL_S)
    return left
