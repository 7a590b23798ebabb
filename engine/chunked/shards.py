"""What a rank adds to a checkpoint and takes from one: weights by name, so that any number of stages can read them.

| file | holds | written by |
|---|---|---|
| `stage-000.safetensors` | tensors `model/<name>`, `optimizer/<name>/<state>`, `best/<name>` | part 0 of replica 0 |
| `history-3.part-000.<array>.npy` | arrays of a layer's table, by `RunTable.export` | the rank that has it |
| `messages-3.part-000.<array>.npy` | likewise, of gradients | the same |
| `history-3.replica-001.part-000.<array>.npy` | likewise, of replica 1 and on | the same |

Histories belong to one cut of the graph and to a replica: they are read again only with the same chunks and parts, by
any number of stages.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from penstock.engine.checkpoint import pack_tensors
from penstock.storage.errors import FormatError
from penstock.storage.manifest import write_atomic
from penstock.storage.npyfile import NpyWriter, drop_pages, open_npy

if TYPE_CHECKING:
    from penstock.engine.chunked.rank import Rank

_PIECE_BYTES = 4 << 20
Entries = dict[str, dict[str, Any]]


def _optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """The optimizer's state by parameter name; `names` are by the parameter's id()."""
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    data = pack_tensors(tensors)
    write_atomic(path, data)
    return {"bytes": len(data), "xxh3": str(xxhash.xxh3_64_hexdigest(data))}


def _pieces(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    rows = max(1, _PIECE_BYTES // max(1, array.nbytes // max(1, len(array))))
    for lo in range(0, len(array), rows):
        yield np.array(array[lo : lo + rows])


def _write_array(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    with NpyWriter(path, array.dtype, array.shape) as writer:
        for piece in _pieces(array):
            writer.append(piece)
            drop_pages(array)  # a copy on disk is mapped: what has been written need not stay
    assert writer.entry is not None
    return {"bytes": writer.entry.bytes, "xxh3": writer.entry.xxh3}


def _owner(rank: "Rank") -> str:
    """Whose tables: names without a replica are of the first, as in runs that have one."""
    replica, part = rank.spec.replica, f"part-{rank.part_index:03d}"
    return f"replica-{replica:03d}.{part}" if replica else part


def save_shard(rank: "Rank", folder: Path) -> Entries:
    """Write what `rank` has; returns size and checksum of every file. DoesNotFit where the disk is full."""
    entries: Entries = {}
    if rank.part_index == 0 and rank.spec.replica == 0:
        tensors = {f"model/{name}": tensor for name, tensor in rank.weights(False).items()}
        tensors |= {f"best/{name}": tensor for name, tensor in rank.best.items()}
        if rank.optimizer is not None:
            found = _optimizer_tensors(rank.optimizer, rank.steps.names)
            tensors |= {f"optimizer/{name}": tensor for name, tensor in found.items()}
        name = f"stage-{rank.spec.layout.stage_of(rank.spec.rank):03d}.safetensors"
        entries[name] = _write_tensors(folder / name, tensors)
    if rank.spec.chunked.checkpoint == "full":
        for table_name, table in rank.tables.items():
            for key, array in table.export().items():
                name = f"{table_name}.{_owner(rank)}.{key}.npy"
                entries[name] = _write_array(folder / name, array)
    return entries


def _read_owned(folder: Path, owned: set[str]) -> dict[str, dict[str, Tensor]]:
    """Tensors of owned names from all shards, by kind."""
    found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "best": {}}
    for path in sorted(folder.glob("stage-*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  not a dictionary
                kind, _, name = key.partition("/")
                if name in owned or name.rpartition("/")[0] in owned:
                    found[kind][name] = file.get_tensor(key)
    return found


def load_shards(rank: "Rank", folder: Path, with_histories: bool) -> None:
    """Restore what `rank` owns. FormatError where the checkpoint lacks some of it."""
    found = _read_owned(folder, rank.owned)
    if missing := rank.owned - set(found["model"]):
        raise FormatError(f"{folder} has no weights for {sorted(missing)[:3]}; it is of another model")
    rank.model.load_state_dict(found["model"], strict=False)
    rank.best = found["best"]
    if rank.optimizer is not None:
        _restore_optimizer(rank, found["optimizer"])
    if with_histories:
        for table_name, table in rank.tables.items():
            prefix = f"{table_name}.{_owner(rank)}."
            arrays = {path.name[len(prefix) : -4]: open_npy(path) for path in folder.glob(f"{prefix}*.npy")}
            if not arrays:
                raise FormatError(f"{folder} has no table {prefix}*; resume with the stages and parts that wrote it")
            table.restore(arrays)


def _restore_optimizer(rank: "Rank", tensors: dict[str, Tensor]) -> None:
    assert rank.optimizer is not None
    ordered = [parameter for group in rank.optimizer.param_groups for parameter in group["params"]]
    names = rank.steps.names
    state: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(ordered):
        prefix = f"{names[id(parameter)]}/"
        if values := {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}:
            state[number] = values
    groups = rank.optimizer.state_dict()["param_groups"]
    rank.optimizer.load_state_dict({"state": state, "param_groups": groups})
