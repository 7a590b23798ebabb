"""The model folder: `model.safetensors`, and `model.json` with all that is needed to rebuild the model and feed it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from pydantic import ValidationError
from torch import nn

from penstock.engine.checkpoint import pack_tensors, read_tensors
from penstock.engine.deep_models import DAGNN, GCNIIConv
from penstock.engine.layers import GCNConv
from penstock.engine.models import ModelConfig, build_model
from penstock.engine.outputs import Outputs
from penstock.engine.topology import count_self_loops
from penstock.storage.errors import DataError, FormatError
from penstock.storage.graph import GraphStore
from penstock.storage.manifest import checksum_file, read_json, write_atomic, write_json
from penstock.storage.paths import AnyPath

FORMAT = "penstock/model"
VERSION = 1
_NORMALISED = (GCNConv, GCNIIConv, DAGNN)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedModel:
    """A model and what is needed to feed it; `is_earlier` where it was saved without saying what its outputs mean."""

    model: nn.Module
    config: ModelConfig
    num_features: int
    num_classes: int
    fanouts: tuple[int, ...]
    outputs: dict[str, Any] | None
    extra: dict[str, Any]
    is_earlier: bool = False

    def check_graph(self, graph: GraphStore) -> None:
        """DataError where the model was trained as another function on a graph like this.

        Earlier releases gave a node that has an edge from itself a second one in GCN, GCNII, ResGCN+ and DAGNN.
        """
        if not self.is_earlier or not any(isinstance(module, _NORMALISED) for module in self.model.modules()):
            return
        if count_self_loops(graph) is not None:
            raise DataError(
                f"an earlier release trained this model, and counted edges from a node to itself twice, which "
                f"{graph.path} has; train again (penstock train --force), or use the release that trained it"
            )


def save_model(
    folder: Path,
    model: nn.Module,
    config: ModelConfig,
    *,
    num_features: int,
    num_classes: int,
    fanouts: tuple[int, ...],
    outputs: Outputs | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write `model.safetensors`, then `model.json`, each atomically; `extra` is JSON kept beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    data = pack_tensors(model.state_dict())
    value = {
        "format": FORMAT,
        "version": VERSION,
        "model": config.model_dump(mode="json"),
        "num_features": num_features,
        "num_classes": num_classes,
        "fanouts": list(fanouts),
        "xxh3": xxhash.xxh3_64_hexdigest(data),
        "outputs": None if outputs is None else outputs.to_json(),
        "extra": dict(extra or {}),
    }
    write_atomic(folder / "model.safetensors", data)
    write_json(folder / "model.json", value)


def check_model_files(folder: Path) -> dict[str, Any]:
    """Read `model.json`; FormatError where the two files are missing, damaged or do not belong together."""
    value = read_json(folder / "model.json", "restore it or train again", keys=("format", "version"))
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise FormatError(f"{folder}/model.json is no {FORMAT} of version {VERSION}; train again")
    path = folder / "model.safetensors"
    if not path.is_file() or checksum_file(path) != value["xxh3"]:
        raise FormatError(f"{path} is missing or not the one that model.json names; restore it or train again")
    found: dict[str, Any] = value
    return found


def load_model(folder: AnyPath) -> TrainedModel:
    """Rebuild the model of a run, in evaluation mode: `penstock.load_model("runs/papers").model`.

    `folder` is a run folder or the `model` folder in it. A module of yours is imported by the path that the run was
    given. FormatError where files are missing or do not belong together.
    """
    folder = Path(folder)
    if not (folder / "model.json").is_file() and (folder / "model" / "model.json").is_file():
        folder = folder / "model"
    value, path = check_model_files(folder), folder / "model.safetensors"
    try:
        config = ModelConfig.model_validate(value["model"])
        model = build_model(config, value["num_features"], value["num_classes"])
        model.load_state_dict(read_tensors(path))
    except (ValidationError, RuntimeError) as error:
        raise FormatError(f"{folder}: the weights do not fit the model that model.json describes ({error})") from error
    return TrainedModel(
        model=model.eval(),
        config=config,
        num_features=value["num_features"],
        num_classes=value["num_classes"],
        fanouts=tuple(value["fanouts"]),
        outputs=value.get("outputs"),
        extra=value["extra"],
        is_earlier="outputs" not in value,
    )
