"""Replicas of a grid: what each draws, that their plans fit together, and that they train as one that averages them."""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from penstock.engine.chunked import rank, schedule
from penstock.engine.chunked.backend import RankFailed
from penstock.engine.chunked.layout import Layout
from penstock.engine.chunked.processes import open_processes
from penstock.engine.chunked.schedule import (
    EpochPlan,
    Kind,
    chunk_order,
    join_plans,
    plan_epoch,
    plan_exact,
    replica_seed,
)
from penstock.engine.chunked.simulate import count_slots, simulate, uniform_costs
from penstock.engine.chunked.spec import RankSpec
from penstock.engine.chunked.state import ChunkedResult
from penstock.engine.chunked.stepping import StageOptimizer
from penstock.engine.chunked.threads import ThreadBackend, open_threads
from penstock.engine.chunked.torch_transport import _lanes
from penstock.engine.chunked.trainer import ChunkedTrainer
from penstock.engine.chunked.validate import ScheduleError, validate_plan, validate_replicas
from penstock.engine.trainer import Stopped
from penstock.storage.manifest import read_json, write_json

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

pytestmark = pytest.mark.slow

MakeCase = Callable[..., "Case"]
LAYOUT = Layout(3, 2, 2)
DROP: dict[str, Any] = {"gradient_mode": "drop", "updates_per_epoch": 2}


def plans(layout: Layout = LAYOUT, updates: Sequence[int] = (2, 2)) -> list[EpochPlan]:
    return [
        plan_epoch(
            layout,
            epoch=1,
            order=chunk_order(0, 1, 4, replica=replica),
            updates=updates[replica],
            gradient_mode="drop",
            replica=replica,
        )
        for replica in range(layout.replicas)
    ]


def test_ranks_of_a_replica_are_consecutive() -> None:
    places = [(LAYOUT.replica_of(r), LAYOUT.part_of(r), LAYOUT.stage_of(r)) for r in range(LAYOUT.num_ranks)]
    assert places == [(r, p, s) for r in range(2) for p in range(2) for s in range(3)]
    assert [LAYOUT.rank(p, s, r) for r, p, s in places] == list(range(12))
    assert list(LAYOUT.ranks_of(1)) == [6, 7, 8, 9, 10, 11]
    assert (LAYOUT.prev_rank(6), LAYOUT.next_rank(5), LAYOUT.next_rank(6)) == (None, None, 7)
    assert (LAYOUT.peers(7), LAYOUT.siblings(7)) == ((10,), (1,))
    assert Layout(1, 2, 3).siblings(2) == (0, 4) and Layout(3, 2).siblings(4) == ()
    with pytest.raises(ValueError, match="replicas=0"):
        Layout(1, 1, 0)


def test_the_first_replica_draws_what_one_alone_does() -> None:
    for epoch in range(3):
        assert chunk_order(7, epoch, 20, replica=0) == chunk_order(7, epoch, 20)
    orders = {chunk_order(7, 0, 20, replica=replica) for replica in range(5)}
    assert len(orders) == 5 and all(sorted(order) == list(range(20)) for order in orders)
    assert chunk_order(7, 1, 20, replica=2) == chunk_order(replica_seed(7, 2), 1, 20)
    seeds = {replica_seed(seed, replica) for seed in range(10) for replica in range(10)}
    assert len(seeds) == 100 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert chunk_order(0, 0, 5, shuffle=False, replica=3) == (0, 1, 2, 3, 4)


def test_plans_of_replicas_are_sound_alone_and_together() -> None:
    found = plans()
    validate_replicas(found, LAYOUT)
    for replica, plan in enumerate(found):
        assert [bool(actions) for actions in plan.actions] == [r // 6 == replica for r in range(12)]
        assert {a.peer // 6 for actions in plan.actions for a in actions if a.peer >= 0} == {replica}
        validate_plan(plan_exact(LAYOUT, [range(1, 2), range(2, 3), range(3, 4)], 4, 1, replica), LAYOUT)
    assert count_slots(join_plans(found), LAYOUT) == count_slots(plans(Layout(3, 2))[0], Layout(3, 2))


def refused(found: list[EpochPlan]) -> str:
    with pytest.raises(ScheduleError) as caught:
        validate_replicas(found, LAYOUT)
    return str(caught.value)


def test_plans_that_do_not_fit_together_are_refused() -> None:
    first, second = plans()
    assert "1 plans for 2 replicas" in refused([first])
    assert "the plan of replica 1 is given for 0" in refused([second, first])
    assert "replica 2 of 2" in refused([first, second, replace(second, replica=2)])
    assert "replica 1 has another epoch than replica 0" in refused([first, replace(second, epoch=2)])
    assert "is of replica 1, the plan of replica 0" in refused([join_plans([first, second]), second])
    text = refused([first, plans(updates=(2, 1))[1]])  # replica 0 waits for a second step of replica 1
    assert "deadlock" in text and "step(group=1)" in text


def test_a_replica_waits_at_a_step_for_the_slower_one() -> None:
    layout = Layout(1, 1, 2)
    costs = uniform_costs(layout, 4)
    costs = replace(costs, forward_s=costs.forward_s * [[1.0], [3.0]], backward_s=costs.backward_s)
    plan = replace(join_plans(plans(layout)), recompute=False)
    found = simulate(plan, layout, costs)
    for actions, spans in zip(plan.actions, found.spans, strict=True):
        steps = [n for n, action in enumerate(actions) if action.kind is Kind.STEP]
        assert [spans[n][0] for n in steps] == [8.0, 16.0]  # two chunks there and back take 2 (3 + 1)
    assert found.busy_s == (8.0, 16.0)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "gcn", "norm": "batch", "grad_clip": 0.2, **DROP},
        {"kind": "gcnii", "stages": 2, "optimizer": "sgd", "momentum": 0.9},
        {"kind": "sage", "parts": 2, "norm": "batch", "stages": 2, "evaluate_every": 2, "refresh_every": 3},
    ],
    ids=["drop", "stages", "parts"],
)
def test_replicas_that_draw_alike_train_as_one(make_case: MakeCase, options: dict[str, Any]) -> None:
    """(a + a) / 2 = a: same orders, no dropout."""
    case = make_case(dtype="float32", shuffle_chunks=False, **options)
    one, two = (case.but(replicas=replicas).run(evaluate=("valid",)) for replicas in (1, 2))
    assert case.equal(two, one) and two.state.evaluations == one.state.evaluations
    assert len(two.reports) == 2 * len(one.reports)
    assert two.history_errors == one.history_errors


def averaged(case: "Case") -> tuple[list[float], dict[str, torch.Tensor]]:
    """The dense program, one per replica, all of which step with the mean of their gradients and statistics."""
    programs = [case.but(seed=replica_seed(case.train.seed, replica)).reference() for replica in range(case.replicas)]
    for program in programs:
        program.history = program.exact()
    losses = []
    for _ in range(case.train.epochs):
        found = []
        for values in zip(*(program.updates() for program in programs), strict=True):
            found.append(sum(values) / len(values))
            for same in zip(*(program.model.parameters() for program in programs), strict=True):
                mean = torch.stack([p.grad for p in same if p.grad is not None]).mean(0)
                for parameter in same:
                    parameter.grad = mean.clone()
            for buffers in zip(*(program.model.buffers() for program in programs), strict=True):
                mean = torch.stack(buffers).double().mean(0)
                for buffer in buffers:
                    buffer.copy_(mean)
        losses.append(sum(found) / len(found))
    return losses, programs[0].model.state_dict()


@pytest.mark.parametrize(
    ("replicas", "options"),
    [
        (2, {"kind": "gcn", "norm": "batch", "dropout": 0.3, "optimizer": "sgd", "lr": 0.5, **DROP}),
        (3, {"kind": "gcnii", "dropout": 0.3, "grad_clip": 0.1, "stages": 2, **DROP}),
        (2, {"kind": "gat", "gradient_mode": "stale", "dropout": 0.2, "optimizer": "sgd", "lr": 0.5}),
    ],
    ids=["batch-norm", "three", "stale"],
)
def test_replicas_average_what_each_finds(make_case: MakeCase, replicas: int, options: dict[str, Any]) -> None:
    case = make_case(replicas=replicas, **options)
    found, (losses, weights) = case.run(), averaged(case)
    assert found.losses == pytest.approx(losses, rel=1e-11)
    assert case.distance(found.weights, weights) < 1e-11
    alone = case.but(replicas=1).run()
    assert case.distance(found.weights, alone.weights) > 1e-4  # the others do say something else


def forget_statistics(patch: pytest.MonkeyPatch) -> None:
    original = StageOptimizer._combine

    def combine(self: StageOptimizer, ranks: Sequence[int], **divisors: int) -> None:
        kept = [tensor.clone() for tensor in self._statistics]
        original(self, ranks, **divisors)
        for tensor, own in zip(self._statistics, kept, strict=True):
            tensor.copy_(own)

    patch.setattr(StageOptimizer, "_combine", combine)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "gradients stay at home": lambda patch: patch.setattr(StageOptimizer, "_combine", lambda *args, **options: None),
    "statistics stay at home": forget_statistics,
    "the same masks": lambda patch: patch.setattr(rank, "replica_seed", lambda seed, replica: seed),
    "the same orders": lambda patch: patch.setattr(schedule, "replica_seed", lambda seed, replica: seed),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_put_in_on_purpose_are_seen(make_case: MakeCase, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = make_case(kind="gcn", norm="batch", replicas=2, dropout=0.3, optimizer="sgd", lr=0.5, **DROP)
    _, weights = averaged(case)
    assert case.distance(case.run().weights, weights) < 1e-11
    FAULTS[name](monkeypatch)
    assert case.distance(case.run().weights, weights) > 1e-4


def test_a_grid_of_replicas_stages_and_parts(make_case: MakeCase) -> None:
    """2 x 2 x 2 ranks against 2 x 1 x 1: stages change no bit, parts the order of sums."""
    case = make_case(kind="gcnii", parts=2, replicas=2, stages=2, dropout=0.3, grad_clip=0.2, **DROP)
    plain = case.but(parts=1, stages=1).run()
    assert case.equal(case.but(parts=1).run(), plain)
    found = case.run()
    assert len(found.reports) == 8
    assert found.losses == pytest.approx(plain.losses, rel=1e-12)
    assert case.distance(found.weights, plain.weights) < 1e-11


def test_replicas_end_with_the_same_bits(make_case: MakeCase) -> None:
    case = make_case(
        kind="gcn", norm="batch", replicas=2, stages=2, dropout=0.3, dtype="float32", grad_clip=0.1, **DROP
    )
    trainer = case.trainer()
    with open_threads(trainer.specs) as backend:
        backend.call("start_cold")
        found = trainer.plans(0)
        assert found[0].order != found[1].order
        own = [found[rank // 2].only_for(rank) for rank in range(4)]
        reports = backend.call("train_epoch", [(plan, (0.1, 0.1)) for plan in own])
        weights = backend.call("weights", [(False,)] * 4)
    assert reports[1].loss != reports[3].loss
    for one, other in ((0, 2), (1, 3)):
        assert weights[one].keys() == weights[other].keys()
        assert all(torch.equal(tensor, weights[other][name]) for name, tensor in weights[one].items())


def test_lanes_that_nccl_opens_ahead_are_those_that_are_used(make_case: MakeCase) -> None:
    case = make_case(kind="gcnii", parts=2, replicas=2, stages=2, epochs=1, grad_clip=0.2, **DROP)
    folder, hubs = case.fresh_folder(), []

    @contextmanager
    def opened(specs: Sequence[RankSpec]) -> Iterator[ThreadBackend]:
        with open_threads(specs) as backend:
            hubs.append(backend.hub)
            yield backend

    ChunkedTrainer(case.specs(), opened, checkpoints=folder / "checkpoints", metrics=folder / "metrics.jsonl").run()
    used = set(hubs[0]._lanes)
    ranks = range(case.layout.num_ranks)
    pairs = [(low, high) for low in ranks for high in ranks if low < high]
    ahead = {
        (low, high, channel) if is_up else (high, low, channel)
        for low, high in pairs
        for channel, is_up in _lanes(case.layout, low, high)
    }
    assert used == ahead
    assert {(low, high) for low, high, channel in used if channel == "reduce" and high - low == 4} == {
        (0, 4),
        (1, 5),
        (2, 6),
        (3, 7),
    }
    assert case.specs()[7].place == "rank 7 (stage 1 of 0..1, part 1 of 0..1, replica 1 of 0..1)"


@pytest.mark.slow
def test_replicas_are_processes_too(make_case: MakeCase) -> None:
    case = make_case(kind="gcnii", replicas=2, stages=2, dropout=0.3, dtype="float32", epochs=2, **DROP)
    folder = case.fresh_folder()
    found = ChunkedTrainer(
        case.specs(), open_processes, checkpoints=folder / "checkpoints", metrics=folder / "metrics.jsonl"
    ).run()
    assert case.equal(found, case.run())


def stopped_after(case: "Case", epochs: int) -> Path:
    """Train, and ask to stop during epoch `epochs`; returns the run's folder."""
    stop, folder = threading.Event(), case.fresh_folder()

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done == epochs:
            stop.set()

    with pytest.raises(Stopped):
        case.run(folder=folder, stop_requested=stop, progress=progress)
    return folder


def go_on(case: "Case", folder: Path) -> ChunkedResult:
    """Resume from a copy, so that several runs may."""
    copy = case.fresh_folder()
    shutil.copytree(folder, copy)
    return case.run(folder=copy)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "gcnii", "dropout": 0.4, "parts": 2},
        {"kind": "gcn", "norm": "batch", "dropout": 0.3, "stages": 2, **DROP},
        {"kind": "gat", "gradient_mode": "mix", "push": "ema", "history_period": 2, "refresh_every": 3},
    ],
    ids=["parts", "drop", "mix"],
)
def test_replicas_go_on_to_the_same_bits(make_case: MakeCase, options: dict[str, Any]) -> None:
    case = make_case(dtype="float32", replicas=2, epochs=5, **options)
    whole = case.run()
    for epochs in (1, 3):
        found = go_on(case.but(stages=3), stopped_after(case, epochs))
        assert found.resumed_from == epochs and case.equal(found, whole)


def test_the_death_of_a_replica_ends_all_and_a_rerun_ends_the_same(
    make_case: MakeCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(kind="gcnii", dropout=0.3, dtype="float32", replicas=2, checkpoint_items=1, **DROP)
    folder, whole = case.fresh_folder(), case.run()
    monkeypatch.chdir(folder.parent)

    class Dying:
        """Ranks of which one dies in the third epoch."""

        def __init__(self, backend: ThreadBackend) -> None:
            self.backend = backend

        def call(self, method: str, arguments: Any = None, poll: Any = None) -> Any:
            if method == "train_epoch" and arguments[0][0].epoch == 2:
                self.backend.hub.aborted.set()
            if method == "save":  # by ranks that may work in another folder
                assert all(path.is_absolute() for (path,) in arguments)
            return self.backend.call(method, arguments, poll)

    @contextmanager
    def open_dying(specs: Sequence[RankSpec]) -> Iterator[Dying]:
        with open_threads(specs) as backend:
            yield Dying(backend)

    here = Path(folder.name)
    trainer = ChunkedTrainer(
        case.specs(), open_dying, checkpoints=here / "checkpoints", metrics=here / "metrics.jsonl", evaluate=()
    )
    with pytest.raises(RankFailed, match="stopped after action"):
        trainer.run()
    found = case.run(folder=folder)
    assert found.resumed_from == 2 and case.equal(found, whole)


def test_new_replicas_start_from_exact_histories(make_case: MakeCase) -> None:
    """One goes on as it was, the other one like a run without histories: their mean is the next loss."""
    case = make_case(kind="gcnii", shuffle_chunks=False, gradient_mode="drop", epochs=3, lr=0.05)
    folder = stopped_after(case, 2)
    light = go_on(case, stopped_after(case.but(checkpoint="light"), 2))
    old, new = go_on(case, folder).losses[2], light.losses[2]
    assert old != pytest.approx(new, rel=1e-6)
    assert go_on(case.but(replicas=2), folder).losses[2] == pytest.approx((old + new) / 2, rel=1e-12)
    assert go_on(case.but(replicas=3), folder).losses[2] == pytest.approx((old + 2 * new) / 3, rel=1e-12)


def test_fewer_replicas_keep_their_histories(make_case: MakeCase) -> None:
    case = make_case(kind="gcnii", epochs=3, lr=0.05, dropout=0.2, replicas=3)
    folder, whole = stopped_after(case, 2), case.run()
    for replicas in (1, 2):
        first = [report.loss for report in whole.reports[:replicas]]
        found = go_on(case.but(replicas=replicas), folder)
        assert found.losses[2] == pytest.approx(sum(first) / replicas, rel=1e-12)


def test_checkpoints_from_before_replicas_are_of_one(make_case: MakeCase) -> None:
    case = make_case(kind="gcnii", dropout=0.3, replicas=1)
    folder, whole = stopped_after(case, 2), case.run()
    paths = list((folder / "checkpoints").glob("step-*/state.json"))
    assert paths
    for path in paths:
        value = read_json(path)
        assert value["state"].pop("replicas") == 1
        assert not [name for name in value["files"] if "replica" in name]
        write_json(path, value)
    assert case.equal(go_on(case, folder), whole)
