"""One configuration for a whole run: every component's own model, composed.

Read from one YAML file, then `--set key=value`, then flags; the later wins. Unknown keys, wrong types and impossible
combinations fail before any work, with the key's name and the nearest key that exists.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from penstock.engine.models import ModelConfig
from penstock.engine.trainer import TrainConfig
from penstock.sampler.neighbors import SampleConfig
from penstock.sampler.plan import PlanConfig
from penstock.storage.budget import parse_bytes

DEFAULT_FANOUTS = (10, 10)


class BudgetConfig(BaseModel):
    """Bytes that a run may use; sizes like `4GiB`. What is not given is derived from the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device_memory: int | None = None
    host_memory: int | None = None
    disk: int | None = None

    @field_validator("device_memory", "host_memory", "disk", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> int | None:
        return None if value is None else parse_bytes(value)


class EvaluateConfig(BaseModel):
    """How valid and test accuracy are measured: on sampled items, exactly over all neighbours, or not at all.

    `fanouts` (DGL order) defaults to the training fanouts. `memory_share` of the host memory is kept for it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["sampled", "exact", "none"] = "sampled"
    fanouts: tuple[int, ...] | None = None
    memory_share: float = Field(0.25, gt=0, lt=0.9)


class RunConfig(BaseModel):
    """Everything that decides the outcome of `penstock train`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: Path
    run_dir: Path
    feed: Literal["packs", "memory"] = "packs"
    sampled_epochs: int = Field(2, ge=1, description="epochs sampled ahead and cycled in reuse mode")
    budgets: BudgetConfig = BudgetConfig()
    sampler: SampleConfig
    plan: PlanConfig = PlanConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_fanouts(cls, value: Any) -> Any:
        if isinstance(value, dict):
            sampler = dict(value.get("sampler") or {}) if isinstance(value.get("sampler"), dict | None) else None
            if sampler is not None and not {"fanouts", "num_neighbors"} & set(sampler):
                return {**value, "sampler": {**sampler, "fanouts": DEFAULT_FANOUTS}}
        return value

    @property
    def num_layers(self) -> int:
        """Layers of the model: one per fanout."""
        return len(self.sampler.fanouts or self.sampler.num_neighbors or ())

    def identity(self) -> dict[str, Any]:
        """What must be equal for a rerun to continue this run, flat: `{"train.lr": 0.01, ...}`."""
        value = flatten(self.model_dump(mode="json"))
        return {key: item for key, item in value.items() if key not in _MAY_CHANGE}

    def digest(self) -> str:
        """A short hash of the identity."""
        return str(xxhash.xxh3_64_hexdigest(yaml.safe_dump(self.identity(), sort_keys=True)))


# Neither weights nor files depend on these, so a run may be continued with others.
_MAY_CHANGE = {"run_dir", "train.checkpoint_items", "train.checkpoint_minutes", "train.keep_checkpoints", "train.log_every"}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) else {f"{prefix}{key}": item}
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """Read `key.path=value`, the value as YAML; ValueError without an equals sign."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set {text!r} is no assignment; write for example --set train.lr=0.01")
    return key.strip(), yaml.safe_load(value)


def _assign(value: dict[str, Any], dotted: str, item: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = value.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ValueError(f"{dotted}: {parent!r} is a value, not a section")
        value = child
    value[last] = item


def _known_keys(model: type[BaseModel], path: Iterable[Any]) -> list[str]:
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        model = annotation
    return list(model.model_fields)


def explain(error: ValidationError, model: type[BaseModel] = RunConfig) -> str:
    """Say in one line per problem which key is wrong, its value, and what to write instead."""
    lines = []
    for problem in error.errors():
        *path, key = problem["loc"] or ("",)
        dotted = ".".join(str(part) for part in (*path, key))
        if problem["type"] == "extra_forbidden":
            known = _known_keys(model, path)
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"unknown key {dotted!r}; {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{dotted} is missing; give it as a flag, in the YAML file or with --set {dotted}=...")
        else:
            lines.append(f"{dotted or 'configuration'}={problem['input']!r}: {problem['msg']}")
    return "; ".join(lines)


def load_config(
    file: Path | None = None, overrides: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Compose a configuration; `flags` have dotted keys and count only where they are not None.

    ValueError where anything is unknown, of a wrong type or missing.
    """
    value: dict[str, Any] = {}
    if file is not None:
        try:
            value = yaml.safe_load(file.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"{file} cannot be read as YAML: {error}") from error
        if not isinstance(value, dict):
            raise ValueError(f"{file} holds a {type(value).__name__}, wanted a mapping of keys")
    for text in overrides:
        _assign(value, *parse_override(text))
    for dotted, item in (flags or {}).items():
        if item is not None:
            _assign(value, dotted, item)
    try:
        return RunConfig.model_validate(value)
    except ValidationError as error:
        raise ValueError(explain(error)) from error
