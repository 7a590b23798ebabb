"""A trace of accesses that somebody else recorded: which rows an item reads, and no more.

Items get a seed, their first row, and a block without edges, so everything that reads traces reads them: the planner,
the packer, and the comparison of policies.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.storage.errors import DataError
from penstock.storage.items import BlockArrays, Item, encode_item, payload_bytes
from penstock.storage.trace import Trace, TraceMeta, publish_trace
from penstock.storage.trace_writer import TraceWindowWriter, begin_trace

_WINDOW_ITEMS = 64


def write_accesses(
    out: Path,
    items: Iterable[NDArray[Any]],
    *,
    num_rows: int,
    num_items: int,
    num_epochs: int = 1,
    graph: str = "recorded",
) -> Trace:
    """Write a trace folder from the row numbers that each item reads, integers in [0, num_rows), in the order of use.

    `num_items` is of all epochs, and a multiple of `num_epochs`; rows that an item names twice count once. DataError
    names the first item that reads nothing or a row that is not there, or says that there are others than `num_items`.
    """
    if num_items < 1 or num_epochs < 1 or num_items % num_epochs:
        raise DataError(f"{num_items} items cannot be {num_epochs} epochs of as many; leave out what is left over")
    meta = TraceMeta(
        graph=graph,
        num_nodes=num_rows,
        seed=0,
        fanouts=(0,),
        method="recorded",
        replace=False,
        weighted=False,
        batch_size=1,
        split="train",
        num_epochs=num_epochs,
        items_per_epoch=num_items // num_epochs,
        window_items=min(_WINDOW_ITEMS, num_items),
        shuffle=False,
    )
    begin_trace(out, meta)
    given = iter(items)
    for window in range(meta.num_windows):
        with TraceWindowWriter(out, meta, window) as writer:
            for number in range(*meta.window_range(window)):
                rows = next(given, None)
                if rows is None:
                    raise DataError(f"there are {number} items, not {num_items}")
                writer.append(_payload(number, rows, meta))
    if next(given, None) is not None:
        raise DataError(f"there are more than {num_items} items")
    return publish_trace(out, meta)


def _payload(number: int, rows: NDArray[Any], meta: TraceMeta) -> NDArray[np.uint8]:
    values = np.asarray(rows)
    if values.ndim != 1 or not len(values) or values.dtype.kind not in "iu":
        raise DataError(f"item {number} has rows {values.dtype} of shape {values.shape}; give integers, one or more")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= meta.num_nodes:
        raise DataError(f"item {number} reads row {low if low < 0 else high}; rows go from 0 to {meta.num_nodes - 1}")
    _, first = np.unique(values, return_index=True)
    ids = values[np.sort(first)].astype(np.int32 if meta.num_nodes < 1 << 31 else np.int64)
    nothing = BlockArrays(num_src=len(ids), num_dst=1, indptr=np.zeros(2, np.int32), indices=np.zeros(0, np.int32))
    item = Item(
        index=number,
        epoch=number // meta.items_per_epoch,
        num_seeds=1,
        input_ids=ids,
        labels=np.full(1, -1, np.int32),
        degrees=None,
        blocks=(nothing,),
    )
    out = np.zeros(payload_bytes(item), np.uint8)
    encode_item(item, out)
    return out
