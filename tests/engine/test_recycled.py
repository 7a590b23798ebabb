import gc
from concurrent.futures import ThreadPoolExecutor

import psutil
import torch

from penstock.engine import recycled

LARGE = (1 << 12, 128)


def test_memory_comes_back_only_when_the_last_view_is_gone() -> None:
    tensor = recycled.empty(*LARGE)
    tensor.fill_(3)
    address, view = tensor.data_ptr(), tensor[5:9].t()
    array = tensor.numpy()
    del tensor
    gc.collect()
    other = recycled.empty(*LARGE)
    other.fill_(4)
    assert other.data_ptr() != address
    assert (view == 3).all() and (array == 3).all()
    del view, array
    gc.collect()
    assert recycled.empty(*LARGE).data_ptr() == address


def test_a_slightly_larger_tensor_fits_and_a_much_smaller_one_takes_another() -> None:
    first = recycled.empty(1_000_000)
    address = first.data_ptr()
    del first
    small = recycled.empty(300_000)
    assert small.data_ptr() != address
    assert recycled.empty(1_040_000).data_ptr() == address


def test_release_frees_what_nobody_holds() -> None:
    held, dropped = recycled.empty(*LARGE).fill_(1), recycled.empty(1 << 26).fill_(1)
    before = psutil.Process().memory_info().rss
    del dropped
    recycled.release()
    assert psutil.Process().memory_info().rss < before - (200 << 20)
    assert (held == 1).all()


def test_shapes_dtypes_and_alignment() -> None:
    tensor = recycled.empty(3, 1 << 18, dtype=torch.int32)
    assert tensor.shape == (3, 1 << 18) and tensor.dtype == torch.int32 and tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    assert recycled.empty(0, 5).shape == (0, 5)


def test_gradients_flow_through_recycled_tensors() -> None:
    weight = torch.ones(128, requires_grad=True)
    out = recycled.empty(*LARGE).fill_(2) * weight
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and (weight.grad == 2 * LARGE[0]).all()


def test_threads_never_share_memory() -> None:
    def hold(value: int) -> bool:
        ok = True
        for _ in range(50):
            tensor = recycled.empty(1 << 19).fill_(value)
            ok &= bool((tensor == value).all())
        return ok

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(hold, range(8)))
