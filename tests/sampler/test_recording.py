"""A recorded lap must end where it began, settled or not: rows that got lost come back with the last item."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from penstock.sampler.accesses import Accesses
from penstock.sampler.movement import Tiers, cyclic_future, settle, take_census
from penstock.sampler.recording import Recording, Table, record
from penstock.sampler.scratch import ItemArrays
from penstock.storage.items import BlockArrays, Item, encode_item, payload_bytes
from penstock.storage.trace import TraceMeta
from penstock.storage.trace_writer import TraceWindowWriter

NUM_NODES, ROW_BYTES = 7, 8
Items = list[NDArray[np.int32]]


def write_trace(folder: Path, items: Items) -> Accesses:
    """A window of items that read these ids; blocks do not matter."""
    meta = TraceMeta(
        graph="",
        num_nodes=NUM_NODES,
        seed=0,
        fanouts=(1,),
        method="uniform",
        replace=False,
        weighted=False,
        batch_size=1,
        split="train",
        num_epochs=1,
        items_per_epoch=len(items),
        window_items=len(items),
    )
    with TraceWindowWriter(folder, meta, 0) as writer:
        for n, ids in enumerate(items):
            block = BlockArrays(num_src=len(ids), num_dst=1, indptr=np.zeros(2, np.int32), indices=ids[:0])
            item = Item(
                index=n,
                epoch=0,
                num_seeds=1,
                input_ids=ids,
                labels=np.zeros(1, np.int32),
                degrees=None,
                blocks=(block,),
            )
            writer.append(encode(item))
    assert writer.index is not None
    return Accesses(folder, [writer.index])


def encode(item: Item) -> NDArray[np.uint8]:
    out = np.empty(payload_bytes(item), np.uint8)
    encode_item(item, out)
    return out


def record_lap(folder: Path, items: Items, num_device: int, num_host: int, max_laps: int) -> Recording:
    num_items = len(items)
    with (
        write_trace(folder, items) as accesses,
        ItemArrays(folder / "future", "<i4", num_items, accesses.num_inputs) as uses,
    ):
        census = take_census(accesses.ids, num_items, NUM_NODES, never=2 * num_items)
        cyclic_future(accesses.ids, num_items, census, uses, NUM_NODES)
        tiers = Tiers(census.counts, policy="belady", num_device=num_device, num_host=num_host, max_inputs=NUM_NODES)
        settle(tiers, accesses.ids, num_items, uses, max_laps=max_laps)
        return record(
            tiers,
            accesses,
            range(num_items),
            uses,
            window_starts=(0, 2),
            table=Table(path=folder, offset=4096, num_rows=NUM_NODES, row_bytes=ROW_BYTES),
            row_bytes=ROW_BYTES,
            scratch=folder,
            cyclic=True,
        )


items_strategy = st.lists(
    st.lists(st.integers(0, NUM_NODES - 1), min_size=1, unique=True).map(lambda v: np.array(v, np.int32)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=80)
@given(items_strategy, st.integers(0, 2), st.integers(0, 5), st.integers(1, 3))
def test_laps_repeat(items: Items, num_device: int, num_host: int, max_laps: int) -> None:
    with TemporaryDirectory() as folder:
        recording = record_lap(Path(folder), items, num_device, num_host, max_laps)
        arrays, slots = recording.arrays, recording.arrays.residents[0].copy()
        held = slots >= 0
        for _ in range(3):
            for n, ids in enumerate(items):
                if n == 2:
                    assert np.array_equal(
                        slots[arrays.residents[1] >= 0], arrays.residents[1][arrays.residents[1] >= 0]
                    )
                missing, (rows, targets) = arrays.missing.get(n), arrays.admits.get(n).reshape(2, -1)
                assert np.all(np.diff(missing) > 0) and len(np.unique(targets)) == len(targets)
                assert np.array_equal(np.concatenate([slots, missing])[arrays.source.get(n)], ids)
                slots[num_device + targets] = missing[rows]
                head = recording.heads[n]
                assert (head.item, head.num_inputs, head.num_rows, head.num_admits) == (
                    n,
                    len(ids),
                    len(missing),
                    len(rows),
                )
            slots[num_device + arrays.wrap[1]] = slots[num_device + arrays.wrap[0]]
            assert np.array_equal(slots[held], arrays.residents[0][held])
        assert arrays.needed.sum() == any(head.num_rows for head in recording.heads)
        inputs = sum(len(ids) for ids in items)
        assert 0 <= recording.device_hits + recording.host_hits <= inputs
        arrays.delete()
        assert not (Path(folder) / "source.bin").exists()


def test_arrays_of_items_may_be_read_in_parts(tmp_path: Path) -> None:
    with (
        ItemArrays(tmp_path / "a", "<i4", 3, np.array([2, 0, 3])) as fixed,
        ItemArrays(tmp_path / "b", "<i8", 2) as grown,
    ):
        fixed.put(2, np.array([7, 8, 9]))
        fixed.put(0, np.array([1, 2]))
        assert fixed.get(0).tolist() == [1, 2] and fixed.get(1).tolist() == [] and fixed.get(2, 1, 3).tolist() == [8, 9]
        grown.put(1, np.array([5]))
        grown.put(0, np.array([6, 7]))
        grown.put(0, np.array([8, 9]))
        assert (grown.get(0).tolist(), grown.get(1).tolist(), grown.num_bytes) == ([8, 9], [5], 24)
