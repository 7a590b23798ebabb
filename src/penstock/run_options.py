"""Options of the verbs that work on a run folder; light, since every start of the command line reads them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from penstock.config import RunConfig

_TRAINING = Parameter(group=Group("Model and training", sort_key=2))
_MACHINE = Parameter(group=Group("Machine", sort_key=3))
_SAMPLED = Parameter(group=Group("Sampled training", sort_key=4))
_FULL_GRAPH = Parameter(group=Group("Full graph (--mode chunked)", sort_key=5))
_CLUSTER = Parameter(group=Group("Replicas and cluster", sort_key=6))
_WATCH = Parameter(group=Group("Watching", sort_key=7))


def parse_fanouts(text: str) -> tuple[int, ...]:
    """Read `10,15,20`; ValueError where it is anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"--fanouts {text!r}: write integers like 10,15,20") from error


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """Options that make a configuration. Flags win over --set, --set over the YAML file."""

    run_dir: str | None = None
    "Folder or URI of the run: trace, packs, checkpoints, result. A rerun with the same configuration continues it."
    experiment: str | None = None
    "Name of an experiment: its checkpoints, model and result lie in RUN_DIR/experiments/NAME, on the packs of RUN_DIR."
    config: Annotated[Path | None, Parameter(name=["--config", "-c"])] = None
    "YAML file with the whole configuration."
    set: Annotated[list[str], Parameter(show_default=False)] = field(default_factory=list)
    "Override one key: --set train.lr=0.01. May be repeated."
    host_memory: Annotated[str | None, _MACHINE] = None
    "Bytes of host memory for tiers and buffers, for example 4GiB. Default: what fits beside the process."
    device_memory: Annotated[str | None, _MACHINE] = None
    "Bytes of device memory for the device tier. Default: 0 on CPU, half of what is free on CUDA."
    disk: Annotated[str | None, _MACHINE] = None
    "Bytes of disk for packs and scratch. Default: nine tenths of what is free."
    fanouts: Annotated[str | None, Parameter(allow_leading_hyphen=True), _SAMPLED] = None
    "Neighbours per layer, input side first, seeds last (DGL order): 10,15,20; -1 takes all."
    batch_size: Annotated[int | None, _SAMPLED] = None
    "Seeds per item."
    model: Annotated[Literal["sage", "gcn", "gat", "gin", "gcnii", "resgcn", "dagnn", "custom"] | None, _TRAINING] = (
        None
    )
    "Kind of layers."
    layers: Annotated[int | None, _TRAINING] = None
    "Number of layers of full-graph training; sampled training has one per fanout."
    hidden: Annotated[int | None, _TRAINING] = None
    "Width of the hidden layers."
    epochs: Annotated[int | None, _TRAINING] = None
    "Epochs to train."
    lr: Annotated[float | None, _TRAINING] = None
    "Learning rate."
    seed: Annotated[int | None, _TRAINING] = None
    "Seed of everything: sampling, initial weights, dropout."
    device: Annotated[str | None, _MACHINE] = None
    "cpu or cuda."
    threads: Annotated[int | None, _MACHINE] = None
    "Threads for sampling, packing and compute. Default: the cores this process may use."
    mode: Literal["sampled", "chunked"] | None = None
    "Train on sampled mini-batches, or on the whole graph in chunks, with layers in a pipeline. Default: sampled."
    chunks: Annotated[int | None, _FULL_GRAPH] = None
    "Chunks of the whole graph. Default: 32."
    stages: Annotated[int | None, _FULL_GRAPH] = None
    "Stages that the layers are split into. Default: 1."
    parts: Annotated[int | None, _FULL_GRAPH] = None
    "Parts that the nodes are split into. Default: 1."
    devices: Annotated[int | None, _FULL_GRAPH] = None
    "Ranks in all; stages and parts are then chosen by predicted time."
    backend: Annotated[Literal["threads", "processes", "ray"] | None, _FULL_GRAPH] = None
    "What ranks are. Default: threads."
    gradient_mode: Annotated[Literal["stale", "surrogate", "gnnpipe", "drop", "mix"] | None, _FULL_GRAPH] = None
    "Gradients between chunks. Default: stale."
    pack_mode: Annotated[Literal["auto", "reuse", "rolling"] | None, _SAMPLED] = None
    "Cycle packs of a few sampled epochs, or sample and pack windows ahead of the trainer."
    policy: Annotated[Literal["belady", "static", "none"] | None, _SAMPLED] = None
    "Who sits in the host tier."
    ray: Annotated[str | None, _CLUSTER] = None
    "Run on Ray: auto (this machine's cluster, or RAY_ADDRESS), local (start one), or host:port."
    replicas: Annotated[int | None, _CLUSTER] = None
    "Replicas of the model, each with its own items and packs; gradients are averaged. Default: 1."
    accumulate: Annotated[int | None, _CLUSTER] = None
    "Items per optimizer step, over all replicas. Default: one per replica."
    feeders: Annotated[int | None, _CLUSTER] = None
    "Processes that sample and pack for the replicas, on any node with room (Ray). Default: 0, replicas do it."
    retries: Annotated[int | None, _CLUSTER] = None
    "How often all replicas or ranks start anew from the newest checkpoint after a failure."
    stage_dir: Annotated[Path | None, _MACHINE] = None
    "Local folder for copies of remote data, and for packs and scratch of replicas."
    track: Annotated[str | None, _WATCH] = None
    "Trackers that get all numbers: tensorboard, mlflow, wandb, separated by commas."
    trace: Annotated[str | None, _WATCH] = None
    "Write timeline.json, for Perfetto, of steps first:stop."

    def load(self, dataset: str | None, *, feed: Literal["memory"] | None = None) -> "RunConfig":
        """Compose the `RunConfig`; ValueError where it is wrong."""
        from penstock.config import load_config

        fanouts = None if self.fanouts is None else parse_fanouts(self.fanouts)
        trace_steps = None
        if self.trace is not None:
            try:
                trace_steps = tuple(int(part) for part in self.trace.split(":"))
            except ValueError as error:
                raise ValueError(f"--trace {self.trace!r}: write two steps like 100:140") from error
        flags = {
            "dataset": dataset,
            "run_dir": self.run_dir,
            "experiment": self.experiment,
            "cluster.address": self.ray,
            "cluster.replicas": self.replicas,
            "cluster.feeders": self.feeders,
            "retries": self.retries,
            "train.accumulate": self.accumulate,
            "remote.stage_dir": None if self.stage_dir is None else str(self.stage_dir),
            "track.trackers": None if self.track is None else tuple(name for name in self.track.split(",") if name),
            "track.trace_steps": trace_steps,
            "budgets.host_memory": self.host_memory,
            "budgets.device_memory": self.device_memory,
            "budgets.disk": self.disk,
            "sampler.fanouts": fanouts,
            "sampler.batch_size": self.batch_size,
            "mode": self.mode,
            "feed": feed,
            "chunked.chunks": self.chunks,
            "chunked.stages": self.stages,
            "chunked.parts": self.parts,
            "chunked.devices": self.devices,
            "chunked.backend": self.backend,
            "chunked.gradient_mode": self.gradient_mode,
            "plan.mode": self.pack_mode,
            "plan.policy": self.policy,
            "model.kind": self.model,
            "model.num_layers": self.layers,
            "model.hidden": self.hidden,
            "train.epochs": self.epochs,
            "train.lr": self.lr,
            "seed": self.seed,
            "train.device": self.device,
            "train.threads": self.threads,
        }
        return load_config(self.config, self.set, flags)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions(ConfigOptions):
    """Options of the verbs that work on a run folder."""

    force: bool = False
    "Delete what an earlier run left in the run folder, or in this experiment, and start anew."
    quiet: bool = False
    "Say nothing but warnings and errors; on stdout only JSON that was asked for."


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Options of the verbs that end with a result."""

    result_json: str | None = None
    "Write a copy of result.json there, at a path or URI."
