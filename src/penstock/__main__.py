"""The command line. Torch, Numba and Ray are imported by the verb that needs them, so that `--help` answers at once."""

import difflib
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from penstock import __version__, exit_codes
from penstock.bench_options import BenchOptions
from penstock.launch_options import KubernetesOptions, SubmitOptions
from penstock.run_options import ConfigOptions, RunOptions, TrainOptions
from penstock.storage import logs

app = App(
    name="penstock",
    help="Train graph neural networks on graphs that do not fit in memory.",
    version=__version__,
    default_parameter=Parameter(negative=()),
)
k8s = App(name="k8s", help="Manifests for Kubernetes.", default_parameter=Parameter(negative=()))
app.command(k8s)
app.register_install_completion_command(help="Install completion of verbs and flags for this shell.")


@app.command
def quickstart(
    directory: Path = Path("penstock-quickstart"),
    *,
    num_nodes: int = 1_000_000,
    host_memory: str | None = None,
    result_json: Path | None = None,
    quiet: bool = False,
) -> None:
    """Generate a graph, train it with an eighth of its features in memory, and again with all: same accuracy.

    Args:
        directory: Folder for the graph (1 GiB at the default size) and the two runs.
        num_nodes: Size of the graph; 50,000 or more.
        host_memory: Bytes that the first training may use. Default: an eighth of the features.
        result_json: Write a copy of result.json there.
        quiet: Say nothing but warnings and errors.
    """
    from penstock.quickstart import run_quickstart

    run_quickstart(directory, num_nodes=num_nodes, host_memory=host_memory, result_json=result_json, quiet=quiet)


@app.command
def ingest(
    source: str,
    out: str,
    *,
    format: Literal["auto", "parquet", "npy", "ogb"] = "auto",
    nodes: str | None = None,
    edges: str | None = None,
    set: list[str] | None = None,
    host_memory: str = "1GiB",
    stage_dir: Path | None = None,
    quiet: bool = False,
) -> None:
    """Turn Parquet tables, NumPy arrays or an OGB folder into a graph store.

    Args:
        source: Folder with nodes.parquet and edges.parquet, with .npy files, or an OGB dataset.
        out: Folder or URI of the graph store to make.
        format: What the source is; auto looks at its files.
        nodes: Node table (file, folder of files, or a pattern in quotes, 'tables/nodes-*.parquet') if it is not
            source/nodes.parquet.
        edges: Edge table, as well, if it is not source/edges.parquet.
        set: An ingest option: --set undirected=true, --set self_loops=add, --set feature_norm=row,
            --set remap_labels=true; `penstock inspect --ingest-options` lists them.
        host_memory: Bytes that ingest may use.
        stage_dir: Local folder where a store for a URI is built.
        quiet: Say nothing but warnings and errors.
    """
    from penstock.data_verbs import run_ingest

    run_ingest(
        source,
        out,
        stage_dir=stage_dir,
        format=format,
        nodes=nodes,
        edges=edges,
        options=set or [],
        host_memory=host_memory,
        quiet=quiet,
    )


@app.command
def generate(
    out: Path,
    *,
    num_nodes: int = 1_000_000,
    set: list[str] | None = None,
    host_memory: str = "1GiB",
    quiet: bool = False,
) -> None:
    """Write a power-law graph whose classes can only be learned from neighbours.

    Args:
        out: Folder of the graph store to make.
        num_nodes: Nodes, 64 or more with the default degree; fewer with --set avg_degree=2 --set num_classes=2.
        set: Another generator option: --set avg_degree=16, --set num_features=128, --set seed=1.
        host_memory: Bytes that the generator may use.
        quiet: Say nothing but warnings and errors.
    """
    from penstock.data_verbs import run_generate

    run_generate(out, num_nodes=num_nodes, options=set or [], host_memory=host_memory, quiet=quiet)


@app.command
def plan(dataset: str | None = None, *, options: RunOptions | None = None, json: bool = False) -> None:
    """Sample, then say what packing and training would move, need and take, before any byte is packed.

    Args:
        dataset: Graph store, a folder or a URI.
        json: Print plan.json instead of a table.
    """
    from penstock.run_verbs import run_plan

    options = options or RunOptions()
    run_plan(options.load(dataset), force=options.force, as_json=json, quiet=options.quiet)


@app.command
def pack(dataset: str | None = None, *, options: RunOptions | None = None) -> None:
    """Sample, plan and write the packs, without training.

    Args:
        dataset: Graph store, a folder or a URI.
    """
    from penstock.run_verbs import run_pack

    options = options or RunOptions()
    run_pack(options.load(dataset), force=options.force, quiet=options.quiet)


@app.command
def train(
    dataset: str | None = None,
    *,
    options: TrainOptions | None = None,
    resume: bool = True,
    if_changed: bool = False,
    in_memory: bool = False,
) -> None:
    """Sample, plan, pack and train; every step is skipped when done and continued when cut off.

    Args:
        dataset: Graph store, a folder or a URI.
        resume: Continue from the newest checkpoint (the default); --resume=false trains again on packs that are there
            and replaces weights and result, which --experiment NAME would keep.
        if_changed: Where weights of another graph or configuration are there, train anew instead of refusing.
        in_memory: Hold all features in memory instead of packs; the same items, losses and weights.
    """
    from penstock.run_verbs import run_train

    options = options or TrainOptions()
    run_train(
        options.load(dataset, feed="memory" if in_memory else None),
        force=options.force,
        resume=resume,
        if_changed=if_changed,
        result_json=options.result_json,
        quiet=options.quiet,
    )


@app.command
def submit(
    dataset: str | None = None,
    *,
    options: TrainOptions | None = None,
    job: SubmitOptions | None = None,
    if_changed: bool = False,
) -> None:
    """Train as a job of a Ray cluster, once: the same command finds a job that runs, or is done.

    Args:
        dataset: Graph store, a folder that the cluster's nodes share or a URI.
        if_changed: Where weights of another graph or configuration are there, train anew instead of refusing.
    """
    from penstock.launch_verbs import How, run_submit

    run, config = options or TrainOptions(), (options or TrainOptions()).load(dataset)
    how: How = "force" if run.force else "if_changed" if if_changed else "resume"
    sys.exit(run_submit(config, job or SubmitOptions(), how=how, copy=run.result_json, quiet=run.quiet))


@k8s.command
def render(
    dataset: str | None = None, *, options: ConfigOptions | None = None, manifest: KubernetesOptions | None = None
) -> None:
    """Print manifests: a RayJob for KubeRay 1.7, or a plain Job for one machine; for `kubectl apply -f -`.

    Args:
        dataset: Graph store, a URI or a path on a mounted volume.
    """
    from penstock.launch_verbs import run_render

    run_render((options or ConfigOptions()).load(dataset), manifest or KubernetesOptions())


@app.command
def infer(
    run_dir: str,
    out: str,
    *,
    experiment: str | None = None,
    dataset: str | None = None,
    stage_dir: Path | None = None,
    split: Literal["all", "train", "valid", "test"] = "all",
    sampled: bool = False,
    fanouts: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    host_memory: str | None = None,
    disk: str | None = None,
    quiet: bool = False,
) -> None:
    """Write predictions and embeddings to Parquet, under the original ids, exact over all neighbours.

    With --sampled over sampled ones, as evaluate.mode=sampled scores them: for any model, also one that cannot go layer
    by layer.

    Args:
        run_dir: Run folder with a trained model, a path or a URI.
        out: Parquet file to write, a path or a URI.
        experiment: Name of the experiment in the run folder whose model is to be used.
        dataset: Graph store, a folder or a URI; default: the one the run was trained on.
        stage_dir: Local folder for copies of remote data.
        split: Nodes to write.
        sampled: Sample neighbourhoods instead of taking all neighbours.
        fanouts: Of --sampled: neighbours per layer, input side first; default: those of the run's evaluation.
        host_memory: Bytes that inference may use.
        disk: Of --sampled: bytes of disk for packs. Default: a power of two that is free.
        quiet: Say nothing but warnings, errors and, on stdout, what was written as JSON.
    """
    from penstock.run_verbs import run_infer

    run_infer(
        run_dir,
        out,
        experiment=experiment,
        dataset=dataset,
        stage_dir=stage_dir,
        split=split,
        sampled=sampled,
        fanouts=fanouts,
        host_memory=host_memory,
        disk=disk,
        quiet=quiet,
    )


@app.command
def inspect(
    path: str | None = None,
    *,
    validate: bool = False,
    seal: bool = False,
    json: bool = False,
    stage_dir: Path | None = None,
    ingest_options: bool = False,
) -> None:
    """Say what a folder is (graph store, trace, packs, run) and what it holds.

    Args:
        path: The folder, or the URI of a graph store or run.
        validate: Read everything and compare checksums.
        seal: Add checksums of blocks to a graph store of an earlier release, after reading everything.
        json: Print JSON instead of a table.
        stage_dir: Local folder for copies of remote data.
        ingest_options: List what `penstock ingest --set` takes, instead of looking at a folder.
    """
    if ingest_options:
        from penstock.data_verbs import print_ingest_options

        return print_ingest_options(as_json=json)
    if path is None:
        raise ValueError("give the folder to inspect, or --ingest-options")
    from penstock.inspection import run_inspect

    run_inspect(path, validate=validate, seal=seal, as_json=json, stage_dir=stage_dir)


@app.command
def config(key: str | None = None, *, explain: bool = True, json: bool = False, markdown: bool = False) -> None:
    """List the keys of the configuration: type, default, meaning, and with what a key is read.

    Args:
        key: A key or a section, as train.lr or train. Default: all.
        explain: Explain them, which is all that this verb does.
        json: Print JSON instead of a table.
        markdown: Print the whole table as the documentation has it.
    """
    from penstock.explanation import run_explain

    run_explain(key, as_json=json, as_markdown=markdown)


@app.command(name="help")
def show_help(*verb: str) -> None:
    """Show the help of a verb, as `penstock VERB --help` does.

    Args:
        verb: The verb, `train` or `k8s render`. Default: list all verbs.
    """
    place = app
    for word in verb:
        names = [name for name in place if not name.startswith("-")]
        if word not in names:
            near = difflib.get_close_matches(word, names, 1, 0.5)
            raise ValueError(
                f"no verb {word!r}; " + (f"did you mean {near[0]!r}?" if near else "penstock help lists all")
            )
        place = place[word]
    app.help_print(list(verb))


@app.command
def doctor(directory: Path = Path("."), *, json: bool = False) -> None:
    """Check this machine: direct I/O, disk speed, memory limits, threads, torch, DGL, Ray, and what to do.

    Args:
        directory: Folder whose disk is checked.
        json: Print JSON instead of a table.
    """
    from penstock.doctor import run_doctor

    run_doctor(directory, as_json=json)


@app.command
def bench(
    name: Literal["sample", "pack", "feed", "epoch", "kernels", "pipeline", "cluster", "memory", "policies", "all"],
    *,
    options: BenchOptions | None = None,
) -> None:
    """Measure Penstock and a peer in one run and print the ratio.

    One repeat takes, on two cores that have other work too, in seconds at --scale 0.02 and at 0.1: pack 10 and 35,
    sample 20 and 40, feed 35 and 70, kernels 25 and 60, epoch 45 and 45, policies 40 at 0.1; at 0.02 cluster 50, memory
    85, pipeline 100. Each further repeat adds less: graphs and packs are made once, except in memory.

    Args:
        name: What to measure; all: everything, one after the other.
    """
    from penstock.benchmarks.run import run_bench

    run_bench(name, **(options or BenchOptions()).arguments())


def _reader_left() -> bool:
    """Whether nobody reads stdout any more; what is still printed then goes nowhere."""
    watch = select.poll()
    watch.register(1, 0)
    left = any(event & select.POLLERR for _, event in watch.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return left


def run(command: Callable[[], object]) -> int:
    """Run a command and turn its error into a message on stderr and an exit code."""
    try:
        command()
    except CycloptsError:
        return exit_codes.USAGE  # cyclopts has printed it, with the nearest match
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return exit_codes.OK  # as `| head` does, which had enough
        code = exit_codes.exit_code(error)
        logs.say_error(error, with_traceback=code == exit_codes.INTERNAL)
        exit_codes.write_termination_log(error, code)
        return code
    return exit_codes.OK


def main(tokens: list[str] | None = None) -> None:
    """Entry point of the `penstock` command."""

    def command() -> None:
        sys.path.append(os.getcwd())  # for a user's module; last, so that it hides nothing
        logs.configure()
        app(tokens, exit_on_error=False, print_error=True)

    sys.exit(run(command))


if __name__ == "__main__":
    main()
