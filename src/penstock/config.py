"""One configuration for a whole run: every component's own model, composed.

Read from one YAML file, then `--set key=value`, then flags; the later wins. Unknown keys, wrong types and impossible
combinations fail before any work, with the key's name and the nearest key that exists.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from penstock.cluster.config import ClusterConfig
from penstock.effects import refuse_ineffective
from penstock.engine.chunked.config import ChunkedConfig
from penstock.engine.models import ModelConfig
from penstock.engine.trainer import TrainConfig
from penstock.locations import EXPERIMENTS, experiment_place
from penstock.overrides import assign, explain, flatten, parse_override
from penstock.sampler.neighbors import SampleConfig, check_fanouts
from penstock.sampler.plan import PlanConfig
from penstock.storage.budget import parse_bytes, parse_memory
from penstock.storage.paths import AnyPath
from penstock.storage.redaction import refuse_secrets
from penstock.storage.remote.config import RemoteConfig, is_uri, local_copy
from penstock.tracking.config import TrackConfig

DEFAULT_FANOUTS = (10, 10)


class BudgetConfig(BaseModel):
    """Bytes that a run may use; sizes like `4GiB`. What is not given is derived from the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_memory: int | None = None
    host_memory: int | None = None
    disk: int | None = None

    @field_validator("device_memory", "disk", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> int | None:
        return None if value is None else parse_bytes(value)

    @field_validator("host_memory", mode="before")
    @classmethod
    def _parse_memory(cls, value: Any) -> int | None:
        return None if value is None else parse_memory(value)


class EvaluateConfig(BaseModel):
    """How valid and test accuracy are measured: on sampled items, exactly over all neighbours, or not at all.

    `fanouts` (DGL order) defaults to the training fanouts. `memory_share` of the host memory is kept for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["sampled", "exact", "none"] = "sampled"
    fanouts: tuple[int, ...] | None = None
    memory_share: float = Field(default=0.25, gt=0, lt=0.9)

    @field_validator("fanouts")
    @classmethod
    def _check_fanouts(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else check_fanouts(value)


class RunConfig(BaseModel):
    """Everything that decides the outcome of `penstock train`.

    `mode` sampled trains on sampled mini-batches (`sampler`, `plan`), chunked on the whole graph (`chunked`). With
    `feed` packs, features come from disk; a chunked run keeps them in memory nevertheless where they fit. It evaluates
    exactly or not at all, and writes numbers every epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Path
    run_dir: Path
    experiment: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="name of an experiment: its results lie in run_dir/experiments/NAME, on the packs of run_dir",
    )
    mode: Literal["sampled", "chunked"] = "sampled"
    feed: Literal["packs", "memory"] = "packs"
    sampled_epochs: int = Field(default=2, ge=1, description="epochs sampled ahead and cycled in reuse mode")
    budgets: BudgetConfig = BudgetConfig()
    sampler: SampleConfig
    plan: PlanConfig = PlanConfig()
    chunked: ChunkedConfig = ChunkedConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cluster: ClusterConfig = ClusterConfig()
    remote: RemoteConfig = RemoteConfig()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, value: Any) -> Any:
        """Two hops of ten neighbours where nothing is said, one layer per hop, an item per replica and step; URIs get
        local copies."""
        if not isinstance(value, dict):
            return value
        value = _place_locally(_accumulate(value))
        sampler, model = (value.get(name) or {} for name in ("sampler", "model"))
        if isinstance(sampler, dict):
            if not {"fanouts", "num_neighbors"} & set(sampler):
                sampler = {**sampler, "fanouts": DEFAULT_FANOUTS}
            fanouts = sampler.get("fanouts") or sampler.get("num_neighbors") or ()
            if (
                value.get("mode") != "chunked"
                and isinstance(model, dict)
                and "num_layers" not in model
                and isinstance(fanouts, list | tuple)
            ):
                model = {**model, "num_layers": max(1, len(fanouts))}
            if sampler.get("weighted") and value.get("mode") != "chunked" and isinstance(model, dict):
                model = _weigh(model)
        return {**value, "sampler": sampler, "model": model}

    @model_validator(mode="after")
    def _is_consistent(self) -> "RunConfig":
        refuse_ineffective(self)
        if self.mode == "chunked":
            return self
        if self.cluster.feeders and (self.plan.mode == "reuse" or self.feed == "memory"):
            key = f"feed={self.feed}" if self.feed == "memory" else f"plan.mode={self.plan.mode}"
            raise ValueError(
                f"{key} with cluster.feeders={self.cluster.feeders}, which sample every epoch anew and send windows of "
                "packs; leave one of them out"
            )
        self._check_weighted()
        hops = len(self.sampler.layer_fanouts)
        if self.model.kind != "custom" and self.model.num_layers != hops:
            raise ValueError(f"model.num_layers={self.model.num_layers}, but there are {hops} fanouts; make them equal")
        if self.evaluate.fanouts is not None and len(self.evaluate.fanouts) != hops:
            raise ValueError(f"evaluate.fanouts={self.evaluate.fanouts} are not {hops} as in training; give {hops}")
        if self.train.accumulate % self.cluster.replicas:
            raise ValueError(
                f"train.accumulate={self.train.accumulate} items per optimizer step cannot be dealt evenly to "
                f"cluster.replicas={self.cluster.replicas}; set accumulate to a multiple of it"
            )
        return self

    def _check_weighted(self) -> None:
        """ValueError where draws by weight would estimate nothing that the model computes."""
        model = self.model
        if not self.sampler.weighted or model.kind == "custom":
            return
        if (model.kind, model.aggregator) != ("sage", "mean"):
            what = f"model.aggregator={model.aggregator}" if model.kind == "sage" else f"model.kind={model.kind}"
            raise ValueError(
                f"sampler.weighted=true with {what}: draws by weight estimate a mean weighted by edge weights, which "
                "this model does not compute; set sampler.weighted=false, or use kind sage with aggregator mean"
            )
        if not model.edge_weights:
            raise ValueError(
                "model.edge_weights=false with sampler.weighted=true: draws by weight estimate the weighted mean, and "
                "exact passes have to compute it; leave model.edge_weights out, or set sampler.weighted=false"
            )

    @property
    def has_replicas(self) -> bool:
        """Whether sampled training runs in processes or actors of its own."""
        cluster = self.cluster
        return self.mode == "sampled" and (cluster.replicas > 1 or cluster.address is not None or cluster.feeders > 0)

    @property
    def evaluates_exactly(self) -> bool:
        """Whether the model is evaluated layer by layer."""
        return self.mode == "chunked" or self.evaluate.mode == "exact"

    @property
    def work_dir(self) -> Path:
        """Folder on each host for packs and scratch of its replicas; beside other local copies where the run is remote,
        since home folders may differ."""
        if self.remote.stage_dir is None and self.remote.run_dir is None:
            return self.run_dir / "local"
        return local_copy(self.remote.run_dir or str(self.run_dir.absolute()), "work", self.remote.stage_dir)

    @property
    def results_dir(self) -> Path:
        """Folder of what belongs to weights, checkpoints and result; packs are in `run_dir`, for all experiments."""
        return self.run_dir if self.experiment is None else self.run_dir / EXPERIMENTS / self.experiment

    @property
    def results_uri(self) -> str | None:
        """The same of a run at a URI."""
        uri = self.remote.run_dir
        return uri if uri is None else experiment_place(uri, self.experiment)

    @property
    def results_place(self) -> str:
        """Where a user finds the results."""
        return self.results_uri or str(self.results_dir)

    def identity(self) -> dict[str, Any]:
        """What the weights depend on beside the graph, flat: `{"train.lr": 0.01, ...}`; see `penstock.identity`."""
        keys = {"mode": self.mode, "plan.row_dtype": self.plan.row_dtype, "evaluate.mode": self.evaluate.mode}
        keys |= flatten({"train": self.train.identity(), "model": self.model.model_dump(mode="json")})
        own = self._identity_in_chunks() if self.mode == "chunked" else self._identity_of_samples()
        return keys | {key: item for key, item in own.items() if key not in _MAY_CHANGE}

    def _identity_of_samples(self) -> dict[str, Any]:
        fanouts, share = list(self.sampler.layer_fanouts), self.train.accumulate // self.cluster.replicas
        keys = flatten({"sampler": self.sampler.model_dump(mode="json")})
        keys |= {"sampler.fanouts": fanouts, "plan.mode": self.plan.mode, "sampled_epochs": self.sampled_epochs}
        if self.evaluate.mode == "sampled":
            keys["evaluate.fanouts"] = fanouts if self.evaluate.fanouts is None else list(self.evaluate.fanouts)
        # gradients are summed in pairs: those of a power of two of items are summed as one replica does
        keys["cluster.replicas"] = 1 if share & (share - 1) == 0 else self.cluster.replicas
        return keys

    def _identity_in_chunks(self) -> dict[str, Any]:
        keys = flatten({"chunked": self.chunked.model_dump(mode="json")})
        keys["evaluate.mode"] = "none" if self.evaluate.mode == "none" else "exact"
        return {**keys, "cluster.replicas": self.cluster.replicas}  # each trains on the whole graph, in its own order

    def digest(self) -> str:
        """A short hash of the identity."""
        return str(xxhash.xxh3_64_hexdigest(yaml.safe_dump(self.identity(), sort_keys=True).encode()))


# Weights do not depend on these, so a run may go on with others.
_MAY_CHANGE = {
    "sampler.degrees",
    "sampler.mode",
    "sampler.num_neighbors",
    "sampler.window_items",
    "chunked.backend",
    "chunked.checkpoint",
    "chunked.defer_weights",
    "chunked.devices",
    "chunked.history_storage",
    "chunked.recompute",
    "chunked.retries",
    "chunked.stages",
    "chunked.timeout_s",
}


def _weigh(model: dict[str, Any]) -> dict[str, Any]:
    """The weighted mean, which draws by weight estimate, where a model has it and nothing is said."""
    has_mean = (model.get("kind", "sage"), model.get("aggregator", "mean")) == ("sage", "mean")
    return {**model, "edge_weights": True} if has_mean and "edge_weights" not in model else model


def _accumulate(value: dict[str, Any]) -> dict[str, Any]:
    """An item per replica and optimizer step where nothing is said; a run that goes on with fewer replicas says it."""
    cluster, train = value.get("cluster"), value.get("train") or {}
    replicas = cluster.get("replicas") if isinstance(cluster, dict) else getattr(cluster, "replicas", None)
    if replicas is None or value.get("mode") == "chunked" or not isinstance(train, dict) or "accumulate" in train:
        return value
    return {**value, "train": {**train, "accumulate": replicas}}


def _place_locally(value: dict[str, Any]) -> dict[str, Any]:
    """Move URIs of dataset and run folder to `remote`, and put the paths of their local copies in their places."""
    remote = value.get("remote") or {}
    for name, kind in (("dataset", "datasets"), ("run_dir", "runs")):
        if is_uri(value.get(name)) and isinstance(remote, dict):
            stage_dir = remote.get("stage_dir")
            place = local_copy(value[name], kind, None if stage_dir is None else Path(stage_dir))
            remote = {**remote, name: value[name]}
            value = {**value, name: place}
    return {**value, "remote": remote}


def load_config(
    file: AnyPath | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Compose the configuration of a run, for `penstock.train`.

        penstock.load_config(flags={"dataset": "papers.graph", "run_dir": "runs/papers", "sampler.fanouts": (10, 15)})
        penstock.load_config("run.yaml", ["train.lr=0.01"])

    The later wins: a YAML file; `overrides`, texts like `train.lr=0.01` as of `--set`; `flags`, by dotted key, which
    count only where they are not None. Paths and sizes may be text (`"budgets.host_memory": "4GiB"`); all keys
    are in docs/command-line.md, and `RunConfig` and its parts say what they mean. `dataset` and `run_dir`
    have to be there.

    `seed` and `retries` stand for the keys that they mean in the configuration's mode. ValueError where anything is
    unknown, of a wrong type or missing, or has no effect; only a file may have keys that say their default and mean
    nothing, since `config.yaml` is written out in full.
    """
    value: dict[str, Any] = {}
    if file is not None:
        file = Path(file)
        try:
            value = yaml.safe_load(file.read_text()) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{file} cannot be read as YAML: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{file} holds a {type(value).__name__}, wanted a mapping of keys")
    given = [parse_override(text) for text in overrides]
    given += [(key, item) for key, item in (flags or {}).items() if item is not None]
    modes = [value.get("mode"), *(item for key, item in given if key == "mode")]
    given = [(key, item) for name, item in given for key in _stands_for(name, modes[-1])]
    for key, item in given:
        assign(value, key, item)
    refuse_secrets(value)  # before anything prints what it is given
    try:
        config = RunConfig.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error, RunConfig)) from error
    refuse_ineffective(config, {key for key, _ in given})
    return config


def _stands_for(name: str, mode: object) -> tuple[str, ...]:
    """The keys that a flag sets."""
    is_chunked = mode == "chunked"
    if name == "seed":
        return ("train.seed",) if is_chunked else ("sampler.seed", "train.seed")
    if name == "retries":
        return ("chunked.retries",) if is_chunked else ("cluster.retries",)
    return (name,)
