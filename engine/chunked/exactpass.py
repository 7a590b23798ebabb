"""The exact pass: every hidden layer over all chunks before the next, in evaluation mode.

It fills histories before training (GAS, Fey et al., ICML 2021, does the same), makes them exact again when asked,
measures how far they were off, and scores the splits. It computes in the tables' `fresh` buffers, which hold nothing
between epochs, so histories change only where the caller ends a period after it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penstock.engine import layered
from penstock.engine.chunked.blocks import ChunkData, ChunkTargets
from penstock.engine.chunked.stage import StageCompute, join_state, split_state
from penstock.engine.metrics import Counts
from penstock.storage.graph import Split
from penstock.storage.history import RowStore


class ExactPass:
    """One pass of one rank; `scratch` are two tables of own rows as wide as what travels between stages."""

    def __init__(
        self,
        compute: StageCompute,
        scratch: tuple[RowStore, RowStore],
        *,
        width: int,
        epoch: int,
        num_classes: int,
        splits: tuple[Split, ...],
        sampled_chunk: int | None,
    ) -> None:
        self._compute, self._scratch, self._width = compute, scratch, width
        self._epoch, self._sampled = epoch, sampled_chunk
        self._everything = np.ones(len(compute.chunks), bool)
        self._splits = splits
        self.counts: dict[Split, Counts] = {split: Counts(num_classes) for split in splits}
        self.errors: dict[int, float] = {}

    @property
    def _model(self) -> nn.Module:
        return self._compute.model

    def enter(self, chunk: int, entry: Tensor, initial: Tensor | None) -> Tensor | None:
        """Take a chunk in; returns what to send on where the stage has no hidden layer."""
        compute = self._compute
        if compute.enters:
            entry, initial = layered.enter(self._model, compute.chunks[chunk].block, entry)
        return self._pass_on(chunk, compute.hidden.start, entry, initial)

    def refresh(self, chunk: int, layer: int) -> Tensor | None:
        """Compute one layer of a chunk; returns what to send on after the stage's last layer."""
        compute = self._compute
        data = compute.chunks[chunk]
        if chunk == self._sampled:
            self._compare(data, chunk, layer)
        state = torch.empty(data.num_own, self._state_width, dtype=compute.dtype)
        self._scratch[layer % 2].read(chunk, state.numpy())
        h, initial = split_state(state.to(compute.device), self._width)
        x = torch.empty(data.num_own + data.num_halo, self._width, dtype=compute.dtype)
        x[: data.num_own] = h
        table = compute.histories[layer]
        table.pull(chunk, self._everything, x[data.num_own :].numpy(), epoch=self._epoch, bound=0)
        out, initial = layered.apply_layer(self._model, layer, data.block, x.to(compute.device), initial)
        return self._pass_on(chunk, layer + 1, out, initial)

    @property
    def _state_width(self) -> int:
        return self._width * (2 if layered.uses_initial(self._model) else 1)

    def _pass_on(self, chunk: int, layer: int, h: Tensor, initial: Tensor | None) -> Tensor | None:
        compute = self._compute
        if layer in compute.hidden:
            compute.push(chunk, layer, h, self._epoch)
            self._scratch[layer % 2].write(chunk, join_state(h, initial).cpu().numpy())
            return None
        if not compute.leaves:
            return join_state(h, initial)
        scores = layered.leave(self._model, h, initial).cpu()
        targets: ChunkTargets | None = compute.targets
        assert targets is not None
        for split in self._splits:
            rows, labels = targets.of(chunk, split)
            self.counts[split].update(scores[rows.cpu()], labels.cpu())
        return None

    def _compare(self, data: ChunkData, chunk: int, layer: int) -> None:
        """Relative distance of the sampled chunk's historical halo from the exact one, before it is replaced."""
        if not data.num_halo:
            return
        table, shape = self._compute.histories[layer], (data.num_halo, self._width)
        exact = np.empty(shape, np.float64 if self._compute.dtype == torch.float64 else np.float32)
        past = np.empty_like(exact)
        table.pull(chunk, self._everything, exact, epoch=self._epoch, bound=0)
        table.pull(chunk, ~self._everything, past, epoch=self._epoch, bound=1 << 40)
        self.errors[layer] = float(np.linalg.norm(past - exact) / max(1e-30, float(np.linalg.norm(exact))))

    def report(self) -> Mapping[Split, dict[str, Any]]:
        """What was counted, ready to be added to that of other parts."""
        return {split: counts.export() for split, counts in self.counts.items()}
