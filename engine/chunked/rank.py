"""One rank: carries out its actions of an epoch or an exact pass, one after the other, over a transport.

Receives are posted as far ahead as the transport likes, so that rows arrive while it computes; sends leave in the
background. A rank owns the
parameters of its stage, their optimizer, and its tables; it is used by one thread.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from penstock.engine.chunked import shards
from penstock.engine.chunked.assemble import assemble
from penstock.engine.chunked.exactpass import ExactPass
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind, replica_seed
from penstock.engine.chunked.spec import ExactReport, RankReport, RankSpec
from penstock.engine.chunked.stage import Position, Tape, join_state, split_state
from penstock.engine.chunked.transport import Channel, Transport
from penstock.engine.dropout import epoch_key
from penstock.engine.models import build_model
from penstock.engine.products import torch_threads
from penstock.storage.budget import peak_rss_bytes
from penstock.storage.graph import Split, open_graph

Heartbeat = Callable[[int, int], None]


def nothing(done: int, total: int) -> None:
    """A heartbeat that nobody hears."""


class Rank:
    """Made by `open_rank`; see there."""

    def __init__(
        self, spec: RankSpec, transport: Transport, model: nn.Module, stack: ExitStack, heartbeat: Heartbeat
    ) -> None:
        self.spec, self.model = spec, model
        self._transport, self._heartbeat = transport, heartbeat
        layout, graph = spec.layout, open_graph(spec.graph)
        self._prev, self._next = layout.prev_rank(spec.rank), layout.next_rank(spec.rank)
        self._num_classes = graph.meta.num_classes
        self._seed = replica_seed(spec.train.seed, spec.replica)
        parts = assemble(spec, graph, transport, model, stack)
        self.owned, self.steps = parts.owned, parts.steps
        self._compute, self._history, self._features = parts.compute, parts.history, parts.features
        self._entries, self._scratch = parts.entries, parts.scratch
        self._width, self._state_width = parts.width, parts.state_width
        self._sizes, self._totals = parts.own_sizes, parts.train_counts
        self._best: dict[str, Tensor] = {}
        self._tapes: dict[int, Tape] = {}
        self._states: dict[tuple[str, int], Tensor] = {}  # received, by phase and chunk
        self._loaded: dict[int, Tensor] = {}
        self._outgoing: dict[int, Tensor] = {}
        self._order: tuple[int, ...] = ()
        self._position_of: dict[int, int] = {}
        self._loss = 0.0
        self._exact: ExactPass | None = None

    def train_epoch(self, plan: EpochPlan, rates: tuple[float, ...]) -> RankReport:
        """Carry out an epoch; `rates` are the learning rates of its steps. Raises PeerLost, StaleRead, ValueError."""
        self.model.train()
        self._order, self._rates, self._plan = plan.order, rates, plan
        self._position_of = {chunk: n for n, chunk in enumerate(plan.order)}
        self._group_starts = {self._position_of[chunks[0]] for chunks in plan.groups}
        self._draw_key, self._loss = epoch_key(self._seed, plan.epoch), 0.0
        if self._features is not None:
            self._features.begin(plan.epoch)
        before = self._counters()
        spans = self._carry_out(plan)
        period = self.spec.chunked.period
        tables = self._compute.histories.values()
        oldest = max((table.max_age(plan.epoch) for table in tables), default=0)
        mean_ages = [table.mean_age(plan.epoch) for table in tables]
        if (plan.epoch + 1) % period == 0:
            for table in tables:
                table.end_period()
        read, written, stall, sent, wait = (now - was for now, was in zip(self._counters(), before, strict=True))
        return RankReport(
            rank=self.spec.rank,
            loss=self._loss,
            kinds=tuple(action.kind.value for action in plan.actions[self.spec.rank]),
            chunks=tuple(action.chunk for action in plan.actions[self.spec.rank]),
            spans=spans,
            bytes_sent=int(sent),
            wait_s=wait,
            history_read_bytes=int(read),
            history_written_bytes=int(written),
            history_stall_s=stall,
            oldest_row=oldest,
            mean_age=sum(mean_ages) / max(1, len(mean_ages)),
            peak_rss_bytes=peak_rss_bytes(),
            host=platform.node(),
        )

    def _counters(self) -> tuple[float, ...]:
        history, transport = self._history, self._transport
        return (
            history.read_bytes,
            history.written_bytes,
            history.stall_s,
            transport.bytes_sent,
            transport.wait_s,
        )

    def _carry_out(self, plan: EpochPlan) -> np.ndarray[Any, np.dtype[np.float64]]:
        actions = plan.actions[self.spec.rank]
        spans = np.empty((len(actions), 2))
        incoming = self._post_receives(plan, actions)
        began = time.perf_counter()
        with torch.set_grad_enabled(not plan.exact):
            for n, action in enumerate(actions):
                spans[n, 0] = time.perf_counter() - began
                try:
                    if action.kind is Kind.RECV:
                        if not self._transport.receives_ahead:
                            next(incoming)
                        state = self._transport.receive(action.peer, action.phase)
                        self._states[action.phase, action.chunk] = state.to(self.spec.device)
                        if self._transport.receives_ahead:
                            next(incoming, None)
                    else:
                        _ACTIONS[action.kind](self, action)
                except ValueError as error:
                    if type(error) is not ValueError:
                        raise
                    raise ValueError(f"{error} (rank {self.spec.rank}, action {n}: {action})") from error
                spans[n, 1] = time.perf_counter() - began
                self._heartbeat(n + 1, len(actions))
        self._transport.flush()
        assert not (self._tapes or self._states or self._loaded), "an epoch left chunks behind"
        return spans

    def _post_receives(self, plan: EpochPlan, actions: tuple[Action, ...]) -> Iterator[None]:
        """Post the first receives; every `next` posts one more."""

        def post() -> Iterator[None]:
            for action in actions:
                if action.kind is Kind.RECV:
                    shape = (int(self._sizes[action.chunk]), self._state_width)
                    self._transport.expect(action.peer, action.phase, shape, self.spec.torch_dtype)
                    yield

        posting = post()
        for _ in range(self._transport.receives_ahead):
            next(posting, None)
        return posting

    def _position(self, chunk: int) -> Position:
        at = self._position_of[chunk]
        is_fresh = np.array([self._position_of[c] <= at for c in range(len(self._order))])
        return Position(epoch=self._plan.epoch, draw_key=self._draw_key, is_fresh=is_fresh)

    def _load(self, action: Action) -> None:
        assert self._features is not None
        features = self._features.load(action.chunk)
        keeps = action.phase == "forward" and not self._plan.recompute and self.spec.features.kind == "packs"
        self._loaded[action.chunk] = features.clone() if keeps else features

    def _entry(self, phase: str, chunk: int) -> tuple[Tensor, Tensor | None]:
        if self._compute.enters:
            return self._loaded.pop(chunk), None
        return split_state(self._states.pop((phase, chunk)), self._width)

    def _forward(self, action: Action) -> None:
        chunk, recompute = action.chunk, self._plan.recompute
        if self._entries is not None:
            self._entries.write(chunk, self._states["forward", chunk].cpu().numpy())
        entry, initial = self._entry("forward", chunk)
        tape, out, out_initial = self._compute.forward(chunk, self._position(chunk), entry, initial, keep=not recompute)
        self._prefetch_after(chunk)
        if tape is not None:
            self._tapes[chunk] = tape
        if out is not None:
            self._outgoing[chunk] = join_state(out, out_initial)

    def _prefetch_after(self, chunk: int) -> None:
        """Start to read what the next chunk of this order will pull: its other inputs are all written now."""
        at = self._position_of[chunk] + 1
        if at < len(self._order):
            self._prefetch_histories(self._order[at])

    def _prefetch_histories(self, chunk: int) -> None:
        position = self._position(chunk)
        for table in self._compute.histories.values():
            table.prefetch(chunk, position.is_fresh, epoch=self._plan.epoch)

    def _prefetch_before(self, chunk: int) -> None:
        """The same on the way back: what recomputation pulls, and messages of chunks that are later in the order."""
        at = self._position_of[chunk] - 1
        if at + 1 in self._group_starts:  # before it are chunks that have had their backward pass
            return
        following = self._order[at]
        if self._plan.recompute:
            self._prefetch_histories(following)
            if self._entries is not None:
                self._entries.prefetch(following)
        done = np.array([self._position_of[c] > at for c in range(len(self._order))])
        for table in self._compute.messages.values():
            table.prefetch(following, done, epoch=self._plan.epoch)

    def _backward(self, action: Action) -> None:
        chunk, epoch = action.chunk, self._plan.epoch
        self._prefetch_before(chunk)
        tape = self._tapes.pop(chunk, None)
        if tape is None:
            tape = self._replay(chunk)
        if self._next is None:
            group = next(chunks for chunks in self._plan.groups if chunk in chunks)
            total = int(self._totals[list(group)].sum())
            value, grad, grad_initial = self._compute.loss(chunk, tape, max(1, total))
            self._loss += value
            if not np.isfinite(value):
                raise ValueError(
                    f"the loss of chunk {chunk} is {value} in epoch {epoch}; lower lr={self.spec.train.lr}, "
                    "or set grad_clip"
                )
        else:
            grad, grad_initial = split_state(self._states.pop(("backward", chunk)), self._width)
        found, found_initial = self._compute.backward(chunk, tape, epoch, grad, grad_initial)
        self._tapes[chunk] = tape
        tape.steps.clear()
        if self._prev is not None:
            if self._state_width != self._width and found_initial is None:
                found_initial = torch.zeros_like(found)
            self._outgoing[chunk] = join_state(found, found_initial)

    def _replay(self, chunk: int) -> Tape:
        if self._entries is not None:
            state = torch.empty(int(self._sizes[chunk]), self._state_width, dtype=self.spec.torch_dtype)
            self._entries.read(chunk, state.numpy())
            entry, initial = split_state(state.to(self.spec.device), self._width)
        else:
            entry, initial = self._loaded.pop(chunk), None
        return self._compute.replay(chunk, self._position(chunk), entry, initial)

    def _send(self, action: Action) -> None:
        channel: Channel = action.phase
        self._transport.send(action.peer, channel, self._outgoing.pop(action.chunk))

    def _weight(self, action: Action) -> None:
        self._tapes.pop(action.chunk).weights.flush()

    def _step(self, action: Action) -> None:
        self.steps.step(self._rates[action.group])

    def exact_pass(
        self, plan: EpochPlan, keep: bool, splits: tuple[Split, ...], sampled_chunk: int | None
    ) -> ExactReport:
        """Carry out an exact pass; `keep` makes its rows the histories. Counts `splits` on the last stage.

        A rank of a replica that another one passes for does nothing.
        """
        if plan.replica != self.spec.replica:
            return ExactReport(rank=self.spec.rank, counts={}, history_errors={}, bytes_sent=0)
        self.model.eval()
        self._plan, self._order = plan, plan.order
        sent = self._transport.bytes_sent
        if self._features is not None:
            self._features.begin(None)
        self._exact = ExactPass(
            self._compute,
            self._scratch,
            width=self._width,
            epoch=plan.epoch,
            num_classes=self._num_classes,
            splits=splits,
            sampled_chunk=sampled_chunk,
        )
        with torch.no_grad():
            self._carry_out(plan)
        if keep:
            for table in self._compute.histories.values():
                table.end_period(exact=True)
        found, self._exact = self._exact, None
        return ExactReport(
            rank=self.spec.rank,
            counts=dict(found.report()) if self._next is None else {},
            history_errors=found.errors,
            bytes_sent=self._transport.bytes_sent - sent,
        )

    def _enter(self, action: Action) -> None:
        assert self._exact is not None
        out = self._exact.enter(action.chunk, *self._entry("exact", action.chunk))
        if out is not None:
            self._outgoing[action.chunk] = out

    def _refresh(self, action: Action) -> None:
        assert self._exact is not None
        out = self._exact.refresh(action.chunk, action.layer)
        if out is not None:
            self._outgoing[action.chunk] = out

    def start_cold(self) -> None:
        """Let all histories be zeros, as before the first epoch."""
        for table in self._compute.histories.values():
            table.fill(-1)

    def keep_best(self) -> None:
        """Remember the weights of now."""
        self._best = {name: tensor.clone() for name, tensor in self.weights(False).items()}

    def weights(self, best: bool) -> dict[str, Tensor]:
        """The stage's part of the model's state, of now or of the best epoch."""
        if best and self._best:
            return self._best
        return {k: t.detach().cpu() for k, t in self.model.state_dict().items() if k in self.owned}

    def save(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Write this rank's shard of a checkpoint into an existing folder; returns size and checksum by file name."""
        return shards.save_shard(self, folder)

    def load(self, folder: Path, with_histories: bool) -> None:
        """Take from a checkpoint what this rank owns, whatever ranks wrote it."""
        shards.load_shards(self, folder, with_histories)

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the stage's parameters; None where it has none."""
        return self.steps.optimizer

    @property
    def best(self) -> dict[str, Tensor]:
        """Weights of the best epoch; empty where there was none."""
        return self._best

    @best.setter
    def best(self, value: Mapping[str, Tensor]) -> None:
        self._best = dict(value)

    @property
    def tables(self) -> dict[str, Any]:
        """History and message tables by name."""
        named = {f"history-{layer}": table for layer, table in self._compute.histories.items()}
        return {**named, **{f"messages-{layer}": table for layer, table in self._compute.messages.items()}}

    @property
    def part_index(self) -> int:
        """The part whose nodes this rank has."""
        return self.spec.layout.part_of(self.spec.rank)


_ACTIONS: dict[Kind, Callable[[Rank, Action], None]] = {
    Kind.LOAD: Rank._load,
    Kind.FORWARD: Rank._forward,
    Kind.SEND: Rank._send,
    Kind.BACKWARD: Rank._backward,
    Kind.WEIGHT: Rank._weight,
    Kind.STEP: Rank._step,
    Kind.ENTER: Rank._enter,
    Kind.REFRESH: Rank._refresh,
}


@contextmanager
def open_rank(spec: RankSpec, transport: Transport, heartbeat: Heartbeat = nothing) -> Iterator[Rank]:
    """Build a rank's model, tables and feed in the calling thread, and free them behind the caller.

    `heartbeat(done, total)` is called after every action.
    """
    graph = open_graph(spec.graph)
    model = build_model(spec.model, graph.meta.num_features, graph.meta.num_classes)
    model.load_state_dict(safetensors.torch.load_file(spec.weights))
    model.to(spec.device, spec.torch_dtype)
    with torch_threads(spec.threads), ExitStack() as stack:
        yield Rank(spec, transport, model, stack, heartbeat)
