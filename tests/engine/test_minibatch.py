import pytest
import torch

from penstock.engine.minibatch import Block, MiniBatch


def batch(*, degrees: bool = True) -> MiniBatch:
    """Seeds 7 and 3; hop one draws 3->7, 5->7, 9->3; hop two draws 5->7, 3->7, 9->3, 2->5, 2->9, 7->9."""
    counts = torch.tensor([4, 5, 6, 7, 8], dtype=torch.int32) if degrees else None
    inner = Block(
        num_src=4,
        num_dst=2,
        indptr=torch.tensor([0, 2, 3], dtype=torch.int32),
        indices=torch.tensor([1, 2, 3], dtype=torch.int32),
        src_degrees=None if counts is None else counts[:4],
    )
    outer = Block(
        num_src=5,
        num_dst=4,
        indptr=torch.tensor([0, 2, 3, 4, 6], dtype=torch.int32),
        indices=torch.tensor([2, 1, 3, 4, 4, 0], dtype=torch.int32),
        src_degrees=counts,
    )
    return MiniBatch(
        step=6,
        item=2,
        epoch=1,
        num_seeds=2,
        input_ids=torch.tensor([7, 3, 5, 9, 2], dtype=torch.int32),
        labels=torch.tensor([1, 0]),
        blocks=(outer, inner),
        features=torch.arange(15.0).reshape(5, 3),
    )


def test_seeds_are_int64_and_first() -> None:
    assert batch().seeds.tolist() == [7, 3]
    assert batch().seeds.dtype == torch.int64


def test_degrees_are_a_prefix_per_block() -> None:
    made = batch()
    assert made.degrees is not None and made.degrees.tolist() == [4, 5, 6, 7, 8]
    inner = made.blocks[1].dst_degrees
    assert inner is not None and inner.tolist() == [4, 5]
    assert batch(degrees=False).degrees is None
    assert batch(degrees=False).blocks[0].dst_degrees is None


def test_clone_does_not_see_later_writes() -> None:
    made = batch()
    copy = made.clone()
    made.features.zero_()
    made.input_ids.zero_()
    made.blocks[0].indices.zero_()
    assert copy.features.sum() == 105
    assert copy.input_ids.tolist() == [7, 3, 5, 9, 2]
    assert copy.blocks[0].indices.tolist() == [2, 1, 3, 4, 4, 0]
    assert (copy.step, copy.item, copy.epoch) == (6, 2, 1)


def test_to_the_same_device_copies_nothing() -> None:
    made = batch()
    assert made.to("cpu").features.data_ptr() == made.features.data_ptr()


def test_to_moves_every_tensor() -> None:
    moved = batch().to("meta")
    tensors = [moved.input_ids, moved.labels, moved.features]
    tensors += [t for b in moved.blocks for t in (b.indptr, b.indices, b.src_degrees) if t is not None]
    assert len(tensors) == 9 and {tensor.device.type for tensor in tensors} == {"meta"}


def test_fields_cannot_be_replaced() -> None:
    with pytest.raises(AttributeError):
        batch().step = 3  # type: ignore[misc]
