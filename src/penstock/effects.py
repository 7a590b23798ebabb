"""Which keys have an effect where: a key that is given and that nothing would read is refused, in every mode.

`EFFECTS` is the whole table. A key without a row is read always. Rows of one key add up: each has to hold. What they
say is held against the code by a test that records which keys real runs read.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from penstock.overrides import flatten

if TYPE_CHECKING:
    from penstock.config import RunConfig

_PLAIN = ("sage", "gcn", "gat", "gin")


@dataclass(frozen=True, slots=True)
class Effect:
    """`keys` are read only where `when` holds; `where` says it in words. A key that ends with a dot is a section."""

    keys: tuple[str, ...]
    where: str
    when: Callable[["RunConfig"], bool]

    def covers(self, key: str) -> bool:
        """Whether this row is about a key."""
        return any(key == own or (own.endswith(".") and key.startswith(own)) for own in self.keys)


def _on_ray(config: "RunConfig") -> bool:
    return config.cluster.address is not None or (config.mode == "chunked" and config.chunked.backend == "ray")


def _sampled(config: "RunConfig") -> bool:
    return config.mode == "sampled"


def _chunked(config: "RunConfig") -> bool:
    return config.mode == "chunked"


def _has_hidden_layers(config: "RunConfig") -> bool:
    model = config.model
    return model.kind != "custom" and (model.kind not in _PLAIN or model.num_layers > 1)


def _evaluates(config: "RunConfig") -> bool:
    return config.evaluate.mode != "none"


def _scores(config: "RunConfig") -> bool:
    return _evaluates(config) and config.train.evaluate_every > 0


EFFECTS: tuple[Effect, ...] = (
    Effect(("sampler.", "plan.mode", "plan.policy", "sampled_epochs"), "mode=sampled", _sampled),
    Effect(("train.accumulate", "train.precision", "train.log_every"), "mode=sampled", _sampled),
    Effect(("evaluate.fanouts", "evaluate.memory_share"), "mode=sampled", _sampled),
    Effect(("cluster.feeders", "cluster.retries", "cluster.timeout_s"), "mode=sampled", _sampled),
    Effect(("chunked.",), "mode=chunked", _chunked),
    # sampling and packs
    Effect(
        ("sampler.method", "sampler.replace"),
        "a fanout other than -1, which takes all neighbours",
        lambda c: any(fanout > 0 for fanout in c.sampler.layer_fanouts),
    ),
    Effect(("plan.policy",), "feed=packs", lambda c: c.feed == "packs"),
    Effect(
        ("budgets.device_memory",),
        "feed=packs in sampled mode, and full-graph training on CUDA",
        lambda c: c.train.device != "cpu" if c.mode == "chunked" else c.feed == "packs",
    ),
    Effect(
        ("sampled_epochs",),
        "plan.mode auto or reuse without feeders; rolling windows are sampled as training goes",
        lambda c: c.plan.mode != "rolling" and not c.cluster.feeders,
    ),
    # model
    Effect(("model.module", "model.kwargs"), "model.kind=custom", lambda c: c.model.kind == "custom"),
    Effect(
        ("model.num_layers", "model.input_dropout"),
        "kinds of ours; a custom module has its own",
        lambda c: c.model.kind != "custom",
    ),
    Effect(
        ("model.hidden", "model.dropout", "model.activation"),
        "kinds of ours with a hidden layer; a custom module has its own",
        _has_hidden_layers,
    ),
    Effect(
        ("model.norm",),
        "sage, gcn, gat, gin with a hidden layer, and resgcn",
        lambda c: c.model.kind == "resgcn" or (c.model.kind in _PLAIN and _has_hidden_layers(c)),
    ),
    Effect(
        ("model.residual",),
        "sage, gcn, gat, gin with a hidden layer",
        lambda c: c.model.kind in _PLAIN and _has_hidden_layers(c),
    ),
    Effect(("model.aggregator", "model.edge_weights"), "model.kind=sage", lambda c: c.model.kind == "sage"),
    Effect(("model.heads", "model.attention_dropout"), "model.kind=gat", lambda c: c.model.kind == "gat"),
    Effect(("model.alpha", "model.theta"), "model.kind=gcnii", lambda c: c.model.kind == "gcnii"),
    # training
    Effect(
        ("train.momentum",),
        "train.optimizer sgd or rmsprop",
        lambda c: c.train.optimizer in ("sgd", "rmsprop"),
    ),
    Effect(("train.decay", "train.decay_epochs"), "train.schedule=step", lambda c: c.train.schedule == "step"),
    Effect(("train.evaluate_every", "evaluate.memory_share"), "evaluate.mode other than none", _evaluates),
    Effect(("train.metric", "train.patience"), "an evaluation: evaluate.mode and evaluate_every not off", _scores),
    Effect(("evaluate.fanouts",), "evaluate.mode=sampled", lambda c: c.evaluate.mode == "sampled"),
    Effect(
        ("evaluate.mode",),
        "mode=sampled where it is sampled; full-graph training evaluates exactly, or not with none",
        lambda c: c.mode == "sampled" or c.evaluate.mode != "sampled",
    ),
    # full-graph training
    Effect(
        ("chunked.backend",),
        "runs without cluster.address, which means Ray",
        lambda c: c.cluster.address is None or c.chunked.backend == "ray",
    ),
    Effect(("chunked.partition_seed",), "chunked.partition=random", lambda c: c.chunked.partition == "random"),
    Effect(("chunked.mix_beta",), "chunked.gradient_mode=mix", lambda c: c.chunked.gradient_mode == "mix"),
    Effect(("chunked.ema_gamma",), "chunked.push=ema", lambda c: c.chunked.push == "ema"),
    Effect(("chunked.cycle_orders",), "chunked.shuffle_chunks=true", lambda c: c.chunked.shuffle_chunks),
    Effect(
        ("chunked.defer_weights",),
        "more than one stage",
        lambda c: c.chunked.stages > 1 or c.chunked.devices is not None,
    ),
    # where it runs
    Effect(
        ("cluster.retries", "cluster.timeout_s"),
        "replicas, feeders or a cluster.address (full-graph training: chunked.retries, chunked.timeout_s)",
        lambda c: c.has_replicas,
    ),
    Effect(
        ("cluster.feeder_threads", "cluster.feeder_disk", "cluster.feeder_resources"),
        "cluster.feeders of 1 or more",
        lambda c: c.cluster.feeders > 0,
    ),
    Effect(("cluster.feeder_resources", "cluster.replica_resources"), "Ray: a cluster.address", _on_ray),
    Effect(
        ("cluster.gpus_per_replica",),
        "train.device=cuda on Ray: a cluster.address",
        lambda c: c.train.device.startswith("cuda") and _on_ray(c),
    ),
    Effect(("cluster.wait_s",), "Ray (a cluster.address) or feeders", lambda c: _on_ray(c) or c.cluster.feeders > 0),
    Effect(
        ("remote.stage_dir",),
        "data at a URI, replicas or feeders",
        lambda c: c.remote.dataset is not None or c.remote.run_dir is not None or c.has_replicas,
    ),
)


@cache
def _defaults() -> dict[str, Any]:
    """What every key is where nobody gives it; keys that others fill in have what they are filled with by default."""
    from penstock.config import DEFAULT_FANOUTS, RunConfig

    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    found: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        own = getattr(sections[name], "model_fields", None)
        if own is None:
            found[name] = field.default
        else:
            found |= {f"{name}.{key}": part.get_default(call_default_factory=True) for key, part in own.items()}
    return found | {"sampler.fanouts": DEFAULT_FANOUTS}


def _defaults_of(config: "RunConfig") -> dict[str, Any]:
    """`_defaults`, with what follows from other keys."""
    layers = {"model.num_layers": len(config.sampler.layer_fanouts)} if config.mode == "sampled" else {}
    return _defaults() | layers


def _values(config: "RunConfig") -> Iterator[tuple[str, Any]]:
    """Every key with its value; a mapping that is a value, as `model.kwargs`, counts as one."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        own = getattr(type(value), "model_fields", None)
        if own is None:
            yield name, value
        else:
            yield from ((f"{name}.{key}", getattr(value, key)) for key in own)


def effective(config: "RunConfig") -> dict[str, Any]:
    """The keys that something reads in this configuration, dotted, with their values."""
    return {key: value for key, value in _values(config) if all(row.when(config) for row in EFFECTS if row.covers(key))}


def effective_flat(config: "RunConfig") -> dict[str, Any]:
    """`effective` as JSON under dotted keys, also of what lies within mappings: for who shows a configuration."""
    kept = effective(config)
    flat = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if any(key == own or key.startswith(f"{own}.") for own in kept)}


def chosen(config: "RunConfig") -> dict[str, Any]:
    """Of `effective`, those with another value than their default: what a configuration says that is its own."""
    defaults = _defaults_of(config)
    return {key: value for key, value in effective(config).items() if value not in (defaults[key], None)}


def refuse_ineffective(config: "RunConfig", given: Collection[str] = ()) -> None:
    """ValueError that names every key which has another value than its default, or is `given`, and no effect.

    Only a configuration that was written out in full has keys without effect that say nothing: those at their defaults.
    """
    defaults, problems = _defaults_of(config), []
    for key, value in _values(config):
        if value in (defaults[key], None) and key not in given:
            continue
        where = next((row.where for row in EFFECTS if row.covers(key) and not row.when(config)), None)
        if where is not None:
            shown = list(value) if isinstance(value, tuple) else value
            problems.append(f"{key}={shown!r} has no effect here: it is for {where}; leave it out")
    if problems:
        raise ValueError("; ".join(problems))
