"""One rank: carries out its actions of an epoch or an exact pass, one after the other, over a transport.

Receives are posted two ahead, so that rows arrive while it computes; sends leave in the background. A rank owns the
parameters of its stage, their optimizer, and its tables; it is used by one thread.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from penstock.engine import layered
from penstock.engine.chunked import shards
from penstock.engine.chunked.blocks import ChunkTargets, load_chunk, train_counts
from penstock.engine.chunked.exactpass import ExactPass
from penstock.engine.chunked.exchange import MirrorExchange
from penstock.engine.chunked.features import FeatureSource, open_features
from penstock.engine.chunked.ownership import hidden_layers, hidden_width, owned_names, unit_tensors
from penstock.engine.chunked.schedule import Action, EpochPlan, Kind
from penstock.engine.chunked.spec import ExactReport, RankReport, RankSpec
from penstock.engine.chunked.stage import Position, StageCompute, Tape, join_state, split_state
from penstock.engine.chunked.transport import Channel, Transport, gather_all
from penstock.engine.dropout import epoch_key
from penstock.engine.models import build_model
from penstock.engine.optim import build_optimizer, set_learning_rate
from penstock.storage.budget import peak_rss_bytes
from penstock.storage.chunks import open_chunks
from penstock.storage.graph import Split, open_graph
from penstock.storage.history import HistoryConfig, HistorySet, open_history

_POSTED = 2  # receives under way per lane
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
        self._graph = open_graph(spec.graph)
        store = open_chunks(spec.chunks)
        layout, device = spec.layout, torch.device(spec.device)
        self._stage, part_index = layout.stage_of(spec.rank), layout.part_of(spec.rank)
        self._prev, self._next = layout.prev_rank(spec.rank), layout.next_rank(spec.rank)
        self._part = store.part(part_index)
        self._totals = train_counts(self._graph, [store.part(w) for w in range(layout.parts)])
        units = unit_tensors(model, self._graph.meta.num_features)
        self.owned = owned_names(units, spec.units)[self._stage]
        self._parameters = [p for name, p in model.named_parameters() if name in self.owned]
        self.optimizer = build_optimizer(self._parameters, spec.train) if self._parameters else None
        self._width = hidden_width(model, self._graph.meta.num_features)
        self._has_initial = layered.uses_initial(model)
        self._sizes = np.array([self._part.chunk(c).num_own for c in range(self._part.num_chunks)])
        self._history = self._open_history(stack)
        self._compute = self._make_compute(device)
        self._features: FeatureSource | None = None
        if spec.first_unit == 0:
            self._features = stack.enter_context(
                open_features(
                    spec.features,
                    self._graph,
                    self._part,
                    halo=layered.first_hidden(model) == 1,
                    host_memory=spec.feed_memory,
                    threads=spec.threads,
                    dtype=spec.torch_dtype,
                    device=device,
                )
            )
        self._best: dict[str, Tensor] = {}
        self._tapes: dict[int, Tape] = {}
        self._states: dict[tuple[str, int], Tensor] = {}  # received, by phase and chunk
        self._loaded: dict[int, Tensor] = {}
        self._outgoing: dict[int, Tensor] = {}
        self._order: tuple[int, ...] = ()
        self._position_of: dict[int, int] = {}
        self._loss = 0.0
        self._exact: ExactPass | None = None

    def _open_history(self, stack: ExitStack) -> HistorySet:
        spec = self.spec
        config = HistoryConfig(
            storage=spec.chunked.history_storage,
            dtype="float64" if spec.dtype == "float64" else spec.chunked.history_dtype,
            push=spec.chunked.push,
            ema_gamma=spec.chunked.ema_gamma,
            poison=spec.poison,
        )
        folder = spec.scratch / f"rank-{spec.rank:03d}"
        return stack.enter_context(
            open_history(folder, self._part.run_sizes, self._sizes, config=config, memory=spec.history_memory)
        )

    def _make_compute(self, device: torch.device) -> StageCompute:
        spec, history, width = self.spec, self._history, self._width
        layers = hidden_layers(self.model)
        # unit 0 is `enter`, unit n the n-th hidden layer
        hidden = range(layers.start + max(0, spec.first_unit - 1), layers.start + spec.last_unit - 1)
        self._state_width = width * (2 if self._has_initial else 1)
        exchange = MirrorExchange(
            self._transport, [spec.layout.rank(part, self._stage) for part in range(spec.layout.parts)]
        )
        sends_gradients = any(spec.chunked.message_weights()) or not exchange.is_alone
        histories = {layer: history.run_table(f"history-{layer}", width) for layer in hidden}
        messages = {layer: history.message_table(f"messages-{layer}", width) for layer in hidden if sends_gradients}
        self._entries = history.row_store("entries", self._state_width) if spec.recompute and self._prev is not None else None
        self._scratch = (history.row_store("exact-0", self._state_width), history.row_store("exact-1", self._state_width))
        leaves = self._next is None
        targets = ChunkTargets(self._graph, self._part, device, spec.torch_dtype) if leaves else None
        return StageCompute(
            self.model,
            [load_chunk(self._part.chunk(c), device) for c in range(self._part.num_chunks)],
            hidden=hidden,
            enters=spec.first_unit == 0,
            leaves=leaves,
            histories=histories,
            messages=messages,
            message_weights=spec.chunked.message_weights(),
            staleness_bound=spec.chunked.staleness_bound,
            exchange=exchange,
            targets=targets,
            dtype=spec.torch_dtype,
            device=device,
        )

    def train_epoch(self, plan: EpochPlan, rates: tuple[float, ...]) -> RankReport:
        """Carry out an epoch; `rates` are the learning rates of its steps. Raises PeerLost, StaleRead, ValueError."""
        self.model.train()
        self._order, self._rates, self._plan = plan.order, rates, plan
        self._position_of = {chunk: n for n, chunk in enumerate(plan.order)}
        self._draw_key, self._loss = epoch_key(self.spec.train.seed, plan.epoch), 0.0
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
                        self._states[action.phase, action.chunk] = self._transport.receive(action.peer, action.phase)
                        next(incoming, None)
                    else:
                        _ACTIONS[action.kind](self, action)
                except ValueError as error:
                    raise type(error)(f"{error} (rank {self.spec.rank}, action {n}: {action})") from error
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
        for _ in range(_POSTED):
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
        tape, out, out_initial = self._compute.forward(
            chunk, self._position(chunk), entry, initial, keep=not recompute
        )
        self._prefetch_after(chunk)
        if tape is not None:
            self._tapes[chunk] = tape
        if out is not None:
            self._outgoing[chunk] = join_state(out, out_initial)

    def _prefetch_after(self, chunk: int) -> None:
        """Start to read what the next chunk of this order will pull: its other inputs are all written now."""
        at = self._position_of[chunk] + 1
        if at < len(self._order):
            following = self._order[at]
            position = self._position(following)
            for table in self._compute.histories.values():
                table.prefetch(following, position.is_fresh, epoch=self._plan.epoch)

    def _backward(self, action: Action) -> None:
        chunk, epoch = action.chunk, self._plan.epoch
        tape = self._tapes.pop(chunk, None)
        if tape is None:
            tape = self._replay(chunk)
        group = next(n for n, chunks in enumerate(self._plan.groups) if chunk in chunks)
        if self._next is None:
            total = int(self._totals[list(self._plan.groups[group])].sum())
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
            if self._has_initial and found_initial is None:
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
        peers = [self.spec.layout.rank(part, self._stage) for part in range(self.spec.layout.parts)]
        with torch.no_grad():
            if len(peers) > 1 and self._parameters:
                self._sum_gradients(peers)
            if self.spec.train.grad_clip is not None:
                self._clip(self.spec.train.grad_clip)
        if self.optimizer is not None:
            set_learning_rate(self.optimizer, self._rates[action.group])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=False)

    def _sum_gradients(self, peers: list[int]) -> None:
        """Add the parts' gradients in part order, so that all parts step to the same bits."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in self._parameters if p.grad is not None])
        total = torch.zeros_like(flat)
        for part in gather_all(self._transport, peers, flat):
            total += part
        at = 0
        for parameter in self._parameters:
            assert parameter.grad is not None
            parameter.grad.copy_(total[at : at + parameter.numel()].view_as(parameter))
            at += parameter.numel()

    def _clip(self, limit: float) -> None:
        """Scale by the norm over all stages, summed per parameter in the model's order: the same bits for any S."""
        squares = torch.zeros(len(list(self.model.parameters())), dtype=torch.float64)
        for n, (name, parameter) in enumerate(self.model.named_parameters()):
            if name in self.owned and parameter.grad is not None:
                squares[n] = parameter.grad.double().square().sum().cpu()
        part = self.spec.layout.part_of(self.spec.rank)
        stages = [self.spec.layout.rank(part, stage) for stage in range(self.spec.layout.stages)]
        total = torch.stack(gather_all(self._transport, stages, squares)).sum(0).sum().sqrt()
        scale = min(1.0, limit / (float(total) + 1e-6))
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(scale)

    def exact_pass(
        self, plan: EpochPlan, keep: bool, splits: tuple[Split, ...], sampled_chunk: int | None
    ) -> ExactReport:
        """Carry out an exact pass; `keep` makes its rows the histories. Counts `splits` on the last stage."""
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
            num_classes=self._graph.meta.num_classes,
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
    torch.set_num_threads(spec.threads)
    graph = open_graph(spec.graph)
    model = build_model(spec.model, graph.meta.num_features, graph.meta.num_classes)
    model.load_state_dict(safetensors.torch.load_file(spec.weights))
    model.to(spec.torch_dtype)
    with ExitStack() as stack:
        yield Rank(spec, transport, model, stack, heartbeat)
