"""What the verbs that work on a run folder do: open what they need, call it, print what came of it."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.chunked_choice import compare_ranks, forecast_ranks, pick_fitting
from penstock.chunked_prepare import cut_graph, prepare_ranks
from penstock.config import RunConfig
from penstock.display import print_columns, print_table, progress
from penstock.engine.chunked.estimate import HEADINGS, RANKS, Choice, estimate_rows
from penstock.inference import infer
from penstock.prepare import own_splits, plan_splits, prepare, read_memory, read_summary
from penstock.process_memory import forecast_rows
from penstock.remedies import with_remedy
from penstock.run import Run, make_model, open_run
from penstock.run_options import parse_fanouts
from penstock.sampled_memory import forecast_replicas
from penstock.sampler.estimate import summary_rows
from penstock.stopping import stop_on_signals
from penstock.storage.budget import format_bytes
from penstock.storage.graph import SeedSet
from penstock.storage.manifest import write_json
from penstock.summary import result_rows
from penstock.training import train


@contextmanager
def _opened(config: RunConfig, *, force: bool, quiet: bool) -> Iterator[Run]:
    """Open the run folder, with progress, and with signals that end steps so that they can be resumed."""
    stop = threading.Event()
    with (
        stop_on_signals(stop),
        progress(quiet=quiet) as show,
        open_run(config, force=force, progress=show, stop_requested=stop) as run,
    ):
        yield run


def run_plan(config: RunConfig, *, force: bool, as_json: bool, quiet: bool) -> None:
    """`penstock plan`."""
    if config.mode == "chunked":
        _plan_chunked(config, force=force, as_json=as_json, quiet=quiet)
        return
    replicas = config.cluster.replicas
    with _opened(config, force=force, quiet=quiet) as opened:
        run = opened if replicas == 1 else _first_replica(opened)
        plan_splits(run, (*own_splits(run), "train"))
        summary, memory = read_summary(run, "train"), read_memory(run, "train")
        text, kept_bytes = (run.path / "train" / "plan.json").read_text(), run.evaluation_bytes
    if as_json:
        print(text)
    elif not quiet:
        whose = "" if replicas == 1 else f", replica 0 of 0..{replicas - 1}"
        rows = summary_rows(summary, kept_bytes=kept_bytes) + (forecast_rows(memory) if memory else [])
        print_table(f"plan of {config.run_dir}{whose}", rows)
        if replicas > 1 and memory and config.cluster.address is None:
            together = forecast_replicas(run, [memory] * replicas).to_json()
            print_table("all replicas, which are processes of this machine", forecast_rows(together))


def _first_replica(run: Run) -> Run:
    """Replica 0 of the run, in a folder where nobody looks for packs; the others have as many items, or one less."""
    folder = run.path / "local" / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = run.config.model_copy(update={"run_dir": folder})
    return Run(config, run.graph, run.progress, run.stop_requested, replicas=run.config.cluster.replicas)


def _plan_chunked(config: RunConfig, *, force: bool, as_json: bool, quiet: bool) -> None:
    """Cut the graph for every number of parts, and say what each split of the ranks is predicted to take."""
    chunked = config.chunked
    devices = chunked.devices or chunked.stages * chunked.parts
    with _opened(config, force=force, quiet=quiet) as run:
        choices, best = with_remedy(run, lambda: _compare(run, devices))
        memory = forecast_ranks(run, make_model(run), best, cut_graph(run, best.parts)).to_json()
        value = {"choices": [choice.to_json() for choice in choices], "picked": choices.index(best), "memory": memory}
        write_json(run.path / "plan.json", value)
    if as_json:
        print(json.dumps(value))
    if as_json or quiet:
        return
    print_columns(f"ways to run {config.run_dir} on {devices} ranks", HEADINGS, estimate_rows(choices), RANKS)
    print_table("memory of the picked split", forecast_rows(memory))
    print(
        f"picked: {best.kind}, --stages {best.stages} --parts {best.parts} --chunks {best.chunks} "
        f"(--devices {devices} lets train choose among those with --chunks {chunked.chunks})"
    )


def _compare(run: Run, devices: int) -> tuple[tuple[Choice, ...], Choice]:
    choices, feature_bytes = compare_ranks(run, make_model(run), devices, lambda parts: cut_graph(run, parts))
    return choices, pick_fitting(run, choices, devices, feature_bytes)


def run_pack(config: RunConfig, *, force: bool, quiet: bool) -> None:
    """`penstock pack`."""
    if config.mode == "chunked":
        with _opened(config, force=force, quiet=quiet) as run:
            ranks = prepare_ranks(run)
        if quiet:
            return
        meta = ranks.chunks.meta
        rows = [("features", ranks.specs[0].features.kind), ("chunks", f"{meta.num_chunks} x {meta.num_parts}")]
        rows += [("cut edges", f"{meta.cut_edges / max(1, meta.num_edges):.1%}"), ("halo rows", f"{meta.alpha:.2f} N")]
        print_table(f"chunks of {config.run_dir}", [*rows, ("balance", f"{meta.balance:.2f}")])
        return
    if config.has_replicas:
        raise ValueError(
            f"cluster.replicas={config.cluster.replicas}, feeders={config.cluster.feeders}, "
            f"address={config.cluster.address}: replicas pack on their own hosts when they train; use penstock train"
        )
    with _opened(config, force=force, quiet=quiet) as run:
        prepared = prepare(run, (*run.evaluated_splits, "train"))
    if quiet:
        return
    done = "" if run.timings.spent else ": already done"
    sizes = [(split, format_bytes(found.summary.pack_bytes)) for split, found in prepared.items()]
    print_table(f"packs of {config.run_dir}{done}", [("mode", prepared["train"].summary.mode), *sizes])


def run_train(
    config: RunConfig, *, force: bool, resume: bool, if_changed: bool, result_json: Path | str | None, quiet: bool
) -> None:
    """`penstock train`."""
    stop = threading.Event()
    with stop_on_signals(stop), progress(quiet=quiet) as show:
        result = train(
            config,
            force=force,
            resume=resume,
            if_changed=if_changed,
            result_json=result_json,
            progress=show,
            stop_requested=stop,
        )
    if quiet:
        return
    status = "already done" if "already_done" in result else result["status"]
    rows = [*result_rows(result), ("result", f"{config.results_place}/result.json")]
    print_table(f"run {config.results_place}: {status}", rows)


def run_infer(
    run_dir: Path | str,
    out: Path | str,
    *,
    experiment: str | None,
    dataset: Path | str | None,
    stage_dir: Path | None,
    split: SeedSet,
    sampled: bool,
    fanouts: str | None,
    host_memory: str | None,
    disk: str | None,
    quiet: bool,
) -> None:
    """`penstock infer`."""
    hops = None if fanouts is None else parse_fanouts(fanouts)
    with progress(quiet=quiet) as show:
        found = infer(
            run_dir,
            out,
            experiment=experiment,
            dataset=dataset,
            stage_dir=stage_dir,
            split=split,
            sampled=sampled,
            fanouts=hops,
            host_memory=host_memory,
            disk=disk,
            progress=show,
        )
    if quiet:
        print(json.dumps(found))
    else:
        shown = {name: format_bytes(value) if name.endswith("_bytes") else value for name, value in found.items()}
        print_table(str(out), [(name.removesuffix("_bytes").replace("_", " "), str(shown[name])) for name in shown])
