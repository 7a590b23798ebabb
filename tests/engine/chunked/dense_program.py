"""Training over chunks as one dense program, and plain full-graph training, in torch and float64.

It shares the models with ours, and nothing else: rows of all nodes lie in whole tables, and one autograd graph per
group of chunks gives the gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from penstock.engine import layered
from penstock.engine.chunked.ownership import hidden_layers
from penstock.engine.chunked.schedule import cut_groups
from penstock.engine.dropout import Draws, epoch_key
from penstock.engine.minibatch import Block

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

Rows = dict[int, Tensor]  # by layer, [N, H]


@dataclass(frozen=True)
class _Piece:
    ids: Tensor
    block: Block

    @property
    def own(self) -> Tensor:
        return self.ids[: self.block.num_dst]

    def drawn(self, key: int, layer: int) -> Block:
        return replace(self.block, draws=Draws(key=key, layer=layer, src_ids=self.ids))


class Reference:
    """Chunked training as one dense program in float64 that autograd differentiates.

    `history` are rows of all nodes by layer; what chunk d found for the rows that it read is `messages[layer, d]`.
    """

    def __init__(self, case: "Case") -> None:
        self.case, self.model, self.epochs = case, case.build().double(), 0
        self.features = torch.from_numpy(np.array(case.graph.features)).double()
        self.labels = torch.from_numpy(np.array(case.graph.labels))
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.optimizer: torch.optim.Optimizer = kinds[case.train.optimizer](
            self.model.parameters(), lr=case.train.lr, weight_decay=case.train.weight_decay
        )
        targets = np.repeat(np.arange(case.graph.num_nodes), np.diff(case.graph.indptr))
        self._loops = np.bincount(targets[targets == case.graph.indices], minlength=case.graph.num_nodes)
        self.pieces = [self._piece(np.flatnonzero(case.chunks == c)) for c in range(case.num_chunks)]
        self.whole = self._piece(np.arange(case.graph.num_nodes))
        self.is_train = torch.zeros(case.graph.num_nodes, dtype=torch.bool)
        self.is_train[torch.from_numpy(np.array(case.graph.split_ids("train"))).long()] = True
        if self.labels.ndim == 1:
            self.is_train &= self.labels >= 0
        self.layers = hidden_layers(self.model)
        self.history: Rows = {layer: torch.zeros_like(rows) for layer, rows in self.exact().items()}
        self.messages: dict[tuple[int, int], Tensor] = {}

    def _piece(self, own: NDArray[np.int64]) -> _Piece:
        graph = self.case.graph
        edges = [np.arange(graph.indptr[node], graph.indptr[node + 1]) for node in own]
        every = np.concatenate(edges)
        sources = np.asarray(graph.indices)[every].astype(np.int64)
        weights = None if graph.edge_weights is None else torch.from_numpy(np.asarray(graph.edge_weights)[every])
        ids = np.concatenate([own, np.setdiff1d(sources, own)])
        at = np.full(graph.num_nodes, -1)
        at[ids] = np.arange(len(ids))
        block = Block(
            num_src=len(ids),
            num_dst=len(own),
            indptr=torch.tensor([0, *np.cumsum([len(e) for e in edges])], dtype=torch.int32),
            indices=torch.from_numpy(at[sources].astype(np.int32)),
            edge_weights=weights,
            src_degrees=torch.from_numpy(np.diff(graph.indptr)[ids].astype(np.int32)),
            src_loops=torch.from_numpy(self._loops[ids].astype(np.int32)),
        )
        return _Piece(torch.from_numpy(ids), block)

    def loss(self, scores: Tensor, ids: Tensor, nodes: int) -> Tensor:
        """Sum over the training nodes among `ids`, over `nodes`."""
        chosen = self.is_train[ids]
        labels = self.labels[ids][chosen]
        if labels.ndim == 2:
            value = functional.binary_cross_entropy_with_logits(scores[chosen], labels.double(), reduction="sum")
            return value / (max(1, nodes) * labels.shape[1])
        return functional.cross_entropy(scores[chosen], labels, reduction="sum") / max(1, nodes)

    def full_loss(self) -> Tensor:
        """Plain full-graph training's loss in the model's mode, dropout as drawn for this epoch."""
        key, num_layers = epoch_key(self.case.train.seed, self.epochs), len(self.model.layers)  # type: ignore[arg-type]
        scores = self.model([self.whole.drawn(key, layer) for layer in range(num_layers)], self.features)
        return self.loss(scores, self.whole.ids, int(self.is_train.sum()))

    def full_gradient(self) -> dict[str, Tensor]:
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        return dict(zip(names, torch.autograd.grad(self.full_loss(), parameters), strict=True))

    def plain_epoch(self) -> float:
        """One step of plain full-graph training."""
        self.model.train()
        loss = self.full_loss()
        loss.backward()  # type: ignore[no-untyped-call]
        self._step()
        self.epochs += 1
        return float(loss.detach())

    def exact(self) -> Rows:
        """Rows of all nodes that enter every hidden layer, in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            h, initial = layered.enter(self.model, self.whole.block, self.features)
            found = {}
            for layer in self.layers:
                found[layer] = h
                h, initial = layered.apply_layer(self.model, layer, self.whole.block, h, initial)
        return found

    def _step(self) -> None:
        if self.case.train.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.train.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def epoch(self, order: Sequence[int] | None = None) -> float:
        """One epoch over chunks."""
        losses = list(self.updates(order))
        return sum(losses) / len(losses)

    def updates(self, order: Sequence[int] | None = None) -> Iterator[float]:
        """An epoch, which gives the loss of each group when its gradients are there, and then makes its step."""
        self.model.train()
        config = self.case.chunked
        order = self.case.order(self.epochs) if order is None else order
        tables = {layer: rows.clone() for layer, rows in self.history.items()}  # what is read of other chunks
        for group in cut_groups(order, config.updates_per_epoch):
            yield self._group(group, order, tables)
            self._step()
        if (self.epochs + 1) % config.period == 0:
            share = config.ema_gamma if config.push == "ema" else 1.0
            self.history = {n: share * rows + (1 - share) * self.history[n] for n, rows in tables.items()}
        self.epochs += 1

    def _group(self, group: Sequence[int], order: Sequence[int], tables: Rows) -> float:
        """Forward and backward of one group of chunks; `tables` go from past rows to fresh ones."""
        fresh, stale = self.case.chunked.message_weights()
        key = epoch_key(self.case.train.seed, self.epochs)
        nodes = sum(int(self.is_train[self.pieces[c].own].sum()) for c in group)
        reads: dict[tuple[int, int], Tensor] = {}
        losses, objective = [], torch.zeros((), dtype=torch.float64)
        for c in group:
            piece = self.pieces[c]
            h, initial = layered.enter(self.model, piece.drawn(key, 0), self.features[piece.ids])
            for layer in self.layers:
                tables[layer] = tables[layer].index_copy(0, piece.own, fresh * h + (1 - fresh) * h.detach())
                for earlier in order[: list(order).index(c)]:  # not done before c in backward: last epoch's gradients
                    if (layer, earlier) in self.messages:
                        objective = objective + stale * (self.messages[layer, earlier][piece.own] * h).sum()
                x = reads[layer, c] = torch.cat([h, tables[layer][piece.ids[len(h) :]]])
                x.retain_grad()
                h, initial = layered.apply_layer(self.model, layer, piece.drawn(key, layer), x, initial)
            losses.append(self.loss(layered.leave(self.model, h, initial), piece.own, nodes))
        (objective + torch.stack(losses).sum()).backward()  # type: ignore[no-untyped-call]
        for (layer, c), x in reads.items():
            piece, table = self.pieces[c], torch.zeros_like(self.history[layer])
            assert x.grad is not None
            table[piece.ids[piece.block.num_dst :]] = x.grad[piece.block.num_dst :]
            self.messages[layer, c] = table
        for layer, rows in tables.items():
            tables[layer] = rows.detach()
        return float(torch.stack(losses).detach().sum())


def check_dense(case: "Case", tolerance: float = 1e-11) -> None:
    """AssertionError unless a run has the losses, last weights and running statistics of the dense program."""
    found, reference = case.run(), case.reference()
    if case.chunked.starts_exact:
        reference.history = reference.exact()
    losses = [reference.epoch() for _ in range(case.train.epochs)]
    assert found.losses == pytest.approx(losses, rel=1e-11)
    assert case.distance(found.weights, reference.model.state_dict()) < tolerance


def check_plain(case: "Case", tolerance: float = 1e-11) -> None:
    """AssertionError unless a run has those of `model(blocks, x)`, autograd and a torch optimizer."""
    found, reference = case.run(), case.reference()
    losses = [reference.plain_epoch() for _ in range(case.train.epochs)]
    assert found.losses == pytest.approx(losses, rel=1e-11)
    assert case.distance(found.weights, reference.model.state_dict()) < tolerance
