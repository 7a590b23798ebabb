"""Memory of the tensors that a computation makes, counted as they come and go."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Counts the bytes of tensors that operations make, as a context; storages of `known` are not ours.

    `live` is what lives now, `peak` the most that did. For one thread, and the backward pass that it runs.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if address in self._seen or not num_bytes:
            return
        self._seen.add(address)
        self.live += num_bytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, num_bytes).atexit = False

    def _drop(self, address: int, num_bytes: int) -> None:
        self._seen.discard(address)
        self.live -= num_bytes
