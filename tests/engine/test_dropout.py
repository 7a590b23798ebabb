from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.engine.blockcache import BlockCache
from penstock.engine.dropout import Draws, NodeDropout, _Mask, dropout, edge_dropout, epoch_key
from penstock.engine.minibatch import Block

P = 0.3


def make_block(ids: Tensor, num_dst: int, *, key: int = 7, layer: int = 2) -> Block:
    """Every destination reads the first three sources."""
    return Block(
        num_src=len(ids),
        num_dst=num_dst,
        indptr=torch.arange(0, 3 * num_dst + 1, 3, dtype=torch.int32),
        indices=torch.arange(3, dtype=torch.int32).repeat(num_dst),
        draws=Draws(key=key, layer=layer, src_ids=ids),
    )


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 4, 21])
@pytest.mark.parametrize("key", [0, 7, 2**64 - 1])
def test_torchs_operations_give_the_kernels_bits(dtype: torch.dtype, width: int, key: int) -> None:
    block = make_block(torch.tensor([3, 2**40, 0, 9, 5]), 4, key=key)
    assert block.draws is not None
    for edges, rows in ((None, 5), (None, 3), ((block.indptr, block.indices), 12)):
        x = values(rows, width, dtype=dtype)
        mask = _Mask(draws=block.draws, salt=1, threshold=20000, edges=edges)
        assert torch.equal(mask.apply(x), mask.apply_torch(x))


def test_a_node_loses_the_same_wherever_it_is() -> None:
    """Its row among others, as a halo row, on any number of threads; not in other layers, epochs and salts."""
    ids, x = torch.arange(5000), torch.ones(5000, 24)
    whole = dropout(x, P, True, make_block(ids, 10))
    part = torch.tensor([4999, 17, 3])
    assert torch.equal(dropout(x[part], P, True, make_block(ids[part], 1)), whole[part])
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(dropout(x, P, True, make_block(ids, 10)), whole)
    finally:
        torch.set_num_threads(before)
    others: list[Any] = [make_block(ids, 10, layer=3), make_block(ids, 10, key=epoch_key(7, 1))]
    assert not any(torch.equal(dropout(x, P, True, other), whole) for other in others)
    assert not torch.equal(dropout(x, P, True, make_block(ids, 10), salt=1), whole)


def test_an_edge_loses_the_same_wherever_it_is() -> None:
    ids = torch.tensor([11, 12, 13, 14, 15])
    whole = edge_dropout(torch.ones(12, 4), P, True, make_block(ids, 4))
    reordered = torch.tensor([12, 11, 13, 15])  # destinations 12 and 11 read sources 12, 11, 13
    part = edge_dropout(torch.ones(6, 4), P, True, make_block(reordered, 2))
    assert torch.equal(part[:3], whole[[4, 3, 5]])
    assert torch.equal(part[3:], whole[[1, 0, 2]])


def refuse(tensor: Tensor) -> Tensor:
    raise AssertionError(f"a tensor of {tensor.shape} was saved")


def test_the_gradient_passes_where_the_value_did_and_nothing_is_stored() -> None:
    block = make_block(torch.arange(5), 4)
    for call, rows in ((dropout, 5), (edge_dropout, 12)):
        x = values(rows, 7, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, call=call: call(x, P, True, block), (x,))
        with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
            call(x, P, True, block)


def test_expectation_is_kept_for_the_rounded_probability() -> None:
    x = torch.ones(20000, 8)
    for p in (0.1, 0.5, 0.9, 1e-4):
        out = dropout(x, p, True, make_block(torch.arange(20000), 1))
        assert abs(float(out.mean()) - 1) < 5 * (p / (1 - p) / x.numel()) ** 0.5
        rounded = round(p * 65536) / 65536
        assert torch.allclose(out.max(), torch.tensor(1 / (1 - rounded)))


def test_out_of_training_nothing_is_dropped() -> None:
    x, block = values(50, 6), make_block(torch.arange(50), 4)
    assert dropout(x, P, False, block) is x and dropout(x, 0.0, True, block) is x
    assert dropout(x, 1e-9, True, block) is x


def test_without_draws_torchs_generator_decides() -> None:
    x, bare = values(50, 6), replace(make_block(torch.arange(50), 4), draws=None)
    results = []
    for call in (
        lambda: dropout(x, P, True, bare),
        lambda: dropout(x, P, True),
        lambda: NodeDropout(P)(bare, x),
        lambda: edge_dropout(x[:12], P, True, bare),
    ):
        torch.manual_seed(1)
        results.append(call()[:12])
    assert all(torch.equal(results[0], result) for result in results[1:])
    assert not torch.equal(results[0], dropout(x, P, True)[:12])  # the next call draws anew


@pytest.mark.parametrize(("dtype", "p"), [(torch.bfloat16, P), (torch.float16, P), (torch.float32, 1.0)])
def test_what_the_kernel_does_not_do_is_torchs(dtype: torch.dtype, p: float) -> None:
    x, results = values(50, 6).to(dtype), []
    for call in (dropout, torch.nn.functional.dropout):
        torch.manual_seed(1)
        results.append(call(x, p, True))
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(x, 1.5, True)


def test_without_draws_bits_do_not_depend_on_threads() -> None:
    x, results = values(3000, 50).requires_grad_(), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        out = dropout(x, P, True)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert torch.equal(grad != 0, out != 0)
        results.append(out.detach())
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    kept = float((results[0] != 0).double().mean())
    assert abs(kept - (1 - P)) < 5 * (P * (1 - P) / x.numel()) ** 0.5


def test_a_module_draws_by_its_salt_and_in_training_only() -> None:
    x, block = values(5, 16), make_block(torch.arange(5), 4)
    first, second = NodeDropout(P), NodeDropout(P, salt=1)
    assert torch.equal(first(block, x), dropout(x, P, True, block))
    assert not torch.equal(first(block, x), second(block, x))
    assert first.eval()(block, x) is x and "p=0.3, salt=1" in repr(second)


def test_impossible_calls_are_named() -> None:
    block = make_block(torch.arange(5), 4)
    with pytest.raises(ValueError, match=r"x has shape \(6, 2\), but draws are for 5 nodes"):
        dropout(torch.ones(6, 2), P, True, block)
    with pytest.raises(ValueError, match=r"x has shape \(5, 2\), the block 12 edges"):
        edge_dropout(torch.ones(5, 2), P, True, block)
    with pytest.raises(ValueError, match="p=1.0 is no probability"):
        NodeDropout(1.0)


def test_blocks_take_their_draws_along_and_leave_the_cache() -> None:
    block = replace(make_block(torch.arange(5), 4), cache=BlockCache())
    same, copy, elsewhere = block.to("cpu"), block.clone(), block.to("meta")
    assert same.cache is block.cache
    assert copy.cache is not None and copy.cache is not block.cache and elsewhere.cache is not block.cache
    assert copy.draws is not None and elsewhere.draws is not None and block.draws is not None
    assert copy.draws.src_ids is not block.draws.src_ids and torch.equal(copy.draws.src_ids, block.draws.src_ids)
    assert elsewhere.draws.src_ids.device.type == "meta" and elsewhere.draws.key == 7
