"""What the weights in a run folder were made of: content and configuration, never a path.

It lies with the weights, in every checkpoint and in `result.json`, so a folder without weights belongs to nobody. What
`auto` leaves open is in it as it was chosen (pack mode, who cuts the graph, parts), and a run that goes on keeps it. Of
a user's module it has digests of the code that the weights began with: other code is no reason to refuse, but told.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.config import RunConfig
from penstock.engine.checkpoint import list_checkpoints
from penstock.engine.usermodule import load_class
from penstock.engine.usersource import differing, sources_of
from penstock.storage.errors import FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import read_json

Keys = dict[str, Any]
SOURCE = "model.source"  # key of the digests of a user's code


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The weights of a run folder: what they were made of, the epochs behind them, and the result where it is done."""

    keys: Keys
    epochs: float
    result: dict[str, Any] | None = None


def identity_of(config: RunConfig, graph: GraphStore, chosen: Mapping[str, Any] | None = None) -> Keys:
    """What weights depend on, flat JSON; `chosen` has what `auto` came to."""
    row_dtype = config.plan.row_dtype or graph.meta.feature_dtype
    keys = {"graph": graph.fingerprint, **config.identity(), "plan.row_dtype": row_dtype, **(chosen or {})}
    if keys.get("plan.mode") == "rolling":  # every epoch is sampled anew
        del keys["sampled_epochs"]
    return keys


def read_trained(folder: Path) -> Trained | None:
    """What the weights in a run folder were made of; None where there are none."""
    result = _read(folder / "result.json")
    if result.get("status") == "ok":
        keys = result.get("identity") or {}
        return Trained(keys=keys, epochs=result.get("metrics", {}).get("epochs", 0), result=result)
    for path in list_checkpoints(folder / "checkpoints"):
        value = _read(path / "state.json")
        if "state" not in value:
            continue  # damaged: who reads it all will say so
        identity = value["state"]["identity"]
        epochs = value["epoch"] if "epoch" in value else value["step"] / identity["items_per_epoch"]
        keys = identity.get("run")
        return Trained(keys=keys if isinstance(keys, dict) else {}, epochs=epochs)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path) if path.is_file() else {}
    except FormatError:
        return {}
    return found if isinstance(found, dict) else {}


def settle(config: RunConfig, trained: Trained | None) -> RunConfig:
    """The configuration with what `auto` leaves open where that is settled: by weights that are there, or by feeders
    and memory, which have no packs to choose.

    ValueError where `chunked.devices` cannot keep the parts that are settled.
    """
    kept = {} if trained is None else trained.keys
    if config.mode == "chunked":
        return _settle_parts(config, kept)
    if config.plan.mode != "auto":
        return config
    mode = "rolling" if config.cluster.feeders else kept.get("plan.mode")
    if mode is None and config.feed == "memory":
        mode = "reuse"
    if mode is None:
        return config
    settled: Keys = {"plan": config.plan.model_copy(update={"mode": mode})}
    if mode == "rolling":  # which has no use for it, so `config.yaml` must not say it
        settled["sampled_epochs"] = RunConfig.model_fields["sampled_epochs"].default
    return config.model_copy(update=settled)


def _settle_parts(config: RunConfig, kept: Keys) -> RunConfig:
    chunked, parts = config.chunked, kept.get("chunked.parts")
    if chunked.devices is None or (chunked.stages, chunked.parts) != (1, 1) or parts is None:
        return config
    if chunked.devices % parts:
        raise ValueError(
            f"chunked.devices={chunked.devices} is no multiple of the {parts} parts that the weights in "
            f"{config.results_place} were trained with, and they depend on it; use a multiple, or train anew (--force)"
        )
    return config.model_copy(update={"chunked": chunked.resolved(chunked.devices // parts, parts)})


def require_same(config: RunConfig, graph: GraphStore, trained: Trained) -> None:
    """ValueError, saying what differs and what to do, where the weights were made of something else."""
    place = config.results_place
    other = "--experiment NAME" if config.experiment is None else "another --experiment NAME"
    remedy = (
        f"keep its results and train beside them on the same packs ({other}), choose another --run-dir, or train anew: "
        "with --force (which deletes what is there), or penstock train --if-changed (anew only where something changed)"
    )
    if not trained.keys:
        raise ValueError(f"{place} does not say what its weights were made of: another version wrote it; {remedy}")
    wanted = identity_of(config, graph)
    found = {key: (trained.keys.get(key), wanted.get(key)) for key in trained.keys.keys() | wanted.keys()}
    auto = {"plan.mode", "chunked.partition"} & {key for key, (_, asked) in found.items() if asked == "auto"}
    apart = auto | {SOURCE}  # which may differ, see `changed_code`
    others = {key: pair for key, pair in sorted(found.items()) if pair[0] != pair[1] and key not in apart}
    if (graphs := others.pop("graph", None)) is not None:
        raise ValueError(
            f"{place} was trained on graph {graphs[0]}, and {config.remote.dataset or config.dataset} is graph "
            f"{graphs[1]} now; give the graph it was trained on, {remedy}"
        )
    if others:
        values = ", ".join(f"{key} ({there} there, {asked} asked)" for key, (there, asked) in others.items())
        ends = " (with this train.schedule the rate of every step depends on the number of epochs)"
        why = ends if "train.epochs" in others and config.train.knows_its_end else ""
        raise ValueError(f"{place} was trained with other values of {values}{why}; use them, {remedy}")
    if config.train.epochs < trained.epochs:
        raise ValueError(
            f"{place} has {trained.epochs:.4g} epochs behind it, train.epochs={config.train.epochs} asks for fewer; "
            f"ask for more, {remedy}"
        )


def code_of(config: RunConfig) -> Keys:
    """The key for digests of a user's module and what it imports; none for models of ours."""
    if config.model.module is None:
        return {}
    return {SOURCE: sources_of(load_class(config.model.module))}


def changed_code(config: RunConfig, trained: Trained) -> str | None:
    """What to say where a user's code is not the one that weights began with."""
    there, now = trained.keys.get(SOURCE), code_of(config).get(SOURCE)
    if there is None or now is None or not (names := differing(there, now)):
        return None
    return f"the code of {', '.join(names)} changed since the weights in {config.results_place} were made"


def _stopped_early(trained: Trained) -> bool:
    return trained.result is not None and bool(trained.result["metrics"]["stopped_early"])


def has_all_epochs(config: RunConfig, trained: Trained) -> bool:
    """Whether a finished run has nothing left to train; see `require_same`."""
    return trained.result is not None and (trained.epochs >= config.train.epochs or _stopped_early(trained))
