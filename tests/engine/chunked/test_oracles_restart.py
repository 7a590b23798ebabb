"""Runs that stop and go on: to the same bits with the histories, from exact histories without."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from penstock.engine.chunked.backend import RankFailed, open_board
from penstock.engine.chunked.state import ChunkedResult
from penstock.engine.chunked.threads import open_threads
from penstock.engine.chunked.trainer import is_worth_saving
from penstock.engine.trainer import Stopped

if TYPE_CHECKING:
    from tests.engine.chunked.conftest import Case

pytestmark = pytest.mark.slow  # a long oracle; gradients and full batches are compared in every run

MakeCase = Callable[..., "Case"]


def stop_after(case: "Case", epochs: int, **options: Any) -> Path:
    """Train, and ask to stop during epoch `epochs`; returns the run's folder."""
    stop, folder = threading.Event(), case.fresh_folder()

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done == epochs:
            stop.set()

    with pytest.raises(Stopped, match=f"stopped after epoch {epochs} of {case.train.epochs}"):
        case.run(folder=folder, stop_requested=stop, progress=progress, **options)
    return folder


def go_on(case: "Case", folder: Path, **options: Any) -> ChunkedResult:
    """Resume from a copy, so that several runs may."""
    copy = case.fresh_folder()
    shutil.copytree(folder, copy)
    return case.run(folder=copy, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "gcnii", "dropout": 0.4},
        {"kind": "gcn", "norm": "batch", "parts": 2, "grad_clip": 0.2},
        {"kind": "gat", "gradient_mode": "mix", "push": "ema", "refresh_every": 3},
        {"kind": "resgcn", "gradient_mode": "gnnpipe", "history_period": 2, "history_dtype": "bfloat16"},
        {"kind": "sage", "gradient_mode": "drop", "updates_per_epoch": 2, "optimizer": "sgd", "momentum": 0.9},
        {"kind": "dagnn", "history_storage": "disk", "parts": 2},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_a_full_checkpoint_goes_on_to_the_same_bits(make_case: MakeCase, options: dict[str, Any]) -> None:
    """Also with another number of stages."""
    case = make_case(num_layers=4, dtype="float32", epochs=5, stages=2, evaluate_every=2, schedule="cosine", **options)
    whole = case.run(evaluate=("valid",))
    for epochs, stages in ((1, 4), (3, 2)):
        folder = stop_after(case, epochs, evaluate=("valid",))
        found = go_on(case.but(stages=stages), folder, evaluate=("valid",))
        assert found.resumed_from == epochs
        assert case.equal(found, whole)
        assert found.state.evaluations == whole.state.evaluations


def test_a_period_that_began_is_taken_up_again(make_case: MakeCase) -> None:
    """Histories of period 3 stop after epochs 4 and 5: what chunks read is still of epoch 2."""
    case = make_case(kind="gcnii", history_period=3, epochs=8, stages=2)
    whole = case.run()
    for epochs in (4, 6):
        assert case.equal(go_on(case, stop_after(case, epochs)), whole)


@pytest.mark.parametrize("checkpoint", ["light", "full"])
@pytest.mark.parametrize("kind", ["gcn", "gcnii"])
def test_without_histories_a_run_goes_on_from_exact_ones(make_case: MakeCase, kind: str, checkpoint: str) -> None:
    """Light checkpoints, and full ones with other chunks or parts: the next loss is the full-graph loss."""
    case = make_case(kind=kind, lr=0.05, epochs=4, checkpoint=checkpoint, weight_decay=0.01)
    folder, stopped = stop_after(case, 2), case.reference()
    stopped.history = stopped.exact()
    for _ in range(2):
        stopped.epoch()
    full = stopped.full_loss().item()
    exact = case.run().losses[2]
    assert exact != pytest.approx(full, rel=1e-6)
    others = make_case(chunks=6, parts=2)
    cut = {"chunks": others.chunks, "parts": others.parts}
    for other in (case.but(stages=3), case.but(**cut, stages=2)):
        if checkpoint == "full" and other.num_chunks == case.num_chunks:
            continue
        found = go_on(other, folder)
        assert found.losses[2] == pytest.approx(full, rel=1e-12)
        assert found.losses[:2] == pytest.approx(case.run().losses[:2], rel=1e-12)


def test_moments_of_the_optimizer_survive_other_stages_and_parts(make_case: MakeCase) -> None:
    """One chunk, so that nothing but weights and optimizer goes on: plain training throughout."""
    case = make_case(chunks=1, kind="gcnii", epochs=6)
    reference = case.reference()
    losses = [reference.plain_epoch() for _ in range(6)]
    folder = stop_after(case.but(stages=2), 3)
    found = go_on(make_case(chunks=1, parts=2, kind="gcnii", epochs=6, stages=3), folder)
    assert found.losses == pytest.approx(losses, rel=1e-12)
    assert case.distance(found.weights, reference.model.state_dict()) < 1e-11


@pytest.mark.parametrize(
    "options",
    [{"evaluate_every": 4}, {"evaluate_every": 1, "refresh_every": 3}, {"evaluate_every": 1, "patience": 2, "lr": 0.3}],
    ids=["undue evaluation", "undue refresh", "patience"],
)
def test_more_epochs_end_as_if_they_had_been_asked_for_at_once(make_case: MakeCase, options: dict[str, Any]) -> None:
    case = make_case(kind="gcnii", epochs=8, stages=2, **options)
    whole = case.run(evaluate=("valid",))
    folder = case.fresh_folder()
    for epochs in (3, 6, 8):
        found = case.but(epochs=epochs).run(folder=folder, evaluate=("valid",))
    assert case.equal(found, whole)
    assert found.state.evaluations == whole.state.evaluations and found.losses == whole.losses
    if not whole.state.stopped_early:
        with pytest.raises(ValueError, match="epochs=5 asks for fewer"):
            case.but(epochs=5).run(folder=folder, evaluate=("valid",))


def test_a_finished_run_gives_its_result_again(make_case: MakeCase) -> None:
    case = make_case(kind="gcn", evaluate_every=1, stages=2)
    folder = case.fresh_folder()
    first = case.run(folder=folder, evaluate=("valid",))
    again = case.run(folder=folder, evaluate=("valid",))
    assert again.resumed_from == case.train.epochs and not again.reports
    assert case.equal(again, first) and asdict(again.state) == asdict(first.state)


def test_metrics_of_a_stopped_run_have_every_epoch_once(make_case: MakeCase) -> None:
    case = make_case(kind="gcn", epochs=4, checkpoint_items=1)
    folder = stop_after(case, 2)
    case.run(folder=folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [line.partition('"epoch": ')[2].partition(",")[0] for line in lines] == ["1", "2", "3", "4"]


def test_a_checkpoint_that_fails_leaves_no_bytes(make_case: MakeCase) -> None:
    case = make_case(kind="gcn", checkpoint_items=1)
    folder = case.fresh_folder()

    def progress(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        if stage == "train" and done == 2:  # takes the name of the checkpoint that is to come
            (folder / "checkpoints" / "step-000000002").touch()

    with pytest.raises(NotADirectoryError):
        case.run(folder=folder, progress=progress)
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert left == {"step-000000001", "step-000000002"}


def test_ranks_that_are_threads_end_at_the_next_action_when_they_are_left(make_case: MakeCase) -> None:
    """One that waits for nobody too: an interrupt must not take as long as an epoch."""
    case = make_case(kind="gcnii")
    (plan,), specs = case.trainer().plans(0), case.specs()
    with open_threads(specs) as backend:
        backend.call("start_cold")
        backend.hub.aborted.set()
        with pytest.raises(RankFailed, match=r"rank 0 stopped after action 1 of \d+"):
            backend.call("train_epoch", [(plan, (0.0,))])
        assert open_board(specs).done()[0] == 1


def test_checkpoints_that_take_long_are_rare() -> None:
    assert not is_worth_saving(9, save_s=0) and is_worth_saving(10, save_s=0)
    assert not is_worth_saving(100, save_s=6) and is_worth_saving(121, save_s=6)
