"""What can be found wrong before anything is written: labels, splits, shares, the device, the model on a tiny block."""

import torch
from torch import nn

from penstock.config import RunConfig
from penstock.engine.chunked.layout import split_stages
from penstock.engine.chunked.ownership import owned_names, unit_tensors
from penstock.engine.chunked.setup import unit_costs
from penstock.engine.contract import check_model
from penstock.engine.layered import check_chunkable
from penstock.engine.models import build_model, needs_degrees
from penstock.engine.trainer import check_device, seed_step
from penstock.sampler.chunking.partition import require_filled
from penstock.sampler.neighbors import count_items
from penstock.storage.deal import Deal
from penstock.storage.errors import DataError
from penstock.storage.graph import UNKNOWN_FLAG, GraphStore, Split

_PIECE = 1 << 16  # labels that are looked at together


def has_labels(graph: GraphStore, split: Split) -> bool:
    """Whether a node of a split has a label; the first that has ends the search."""
    ids = graph.split_ids(split)
    pieces = (graph.labels[ids[lo : lo + _PIECE]] for lo in range(0, len(ids), _PIECE))
    return any((labels[:, 0] != UNKNOWN_FLAG if graph.meta.multi_label else labels >= 0).any() for labels in pieces)


def check(config: RunConfig, graph: GraphStore) -> None:
    """DataError where the graph has nothing to train on, ValueError where the configuration does not go with it, with
    this machine or with the model."""
    _check_folder(config, graph)
    _check_data(config, graph)
    _check_edge_weights(config, graph)
    _check_shares(config, graph)
    places_itself = config.cluster.address is not None or config.chunked.backend == "ray"
    if not places_itself:
        check_device(config.train)
    seed_step(config.train.seed, -1, torch.device("cpu"))
    meta = graph.meta
    model = build_model(config.model, meta.num_features, meta.num_classes)
    if config.mode == "chunked":
        check_chunkable(model)
    check_model(
        model,
        num_layers=len(model.layers) if config.mode == "chunked" else len(config.sampler.layer_fanouts),  # type: ignore[arg-type]  # a ModuleList
        num_features=meta.num_features,
        num_classes=meta.num_classes,
        multi_label=meta.multi_label,
        weighted=meta.has_edge_weights,
        degrees=needs_degrees(config.model),
        by_layer=config.evaluates_exactly,
        device="cpu" if places_itself else config.train.device,
    )
    if config.mode == "chunked":
        _check_cut(config, graph, model.cpu())


def _check_folder(config: RunConfig, graph: GraphStore) -> None:
    folder = config.run_dir
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run_dir={folder} is a file; choose another --run-dir")
    if folder.resolve() == graph.path.resolve():
        raise ValueError(f"run_dir={folder} is the dataset, whose files a run must not touch; choose another --run-dir")


def _check_cut(config: RunConfig, graph: GraphStore, model: nn.Module) -> None:
    num_features = graph.meta.num_features
    check_chunkable(model, num_features)
    units = split_stages(unit_costs(model, graph), config.chunked.stages)
    owned_names(unit_tensors(model, num_features), [(unit.start, unit.stop) for unit in units])


def _check_edge_weights(config: RunConfig, graph: GraphStore) -> None:
    keys = {"model.edge_weights": config.model.edge_weights}
    if config.mode == "sampled":
        keys["sampler.weighted"] = config.sampler.weighted
    wanted = [key for key, is_on in keys.items() if is_on]
    if wanted and not graph.meta.has_edge_weights:
        raise ValueError(
            f"{' and '.join(wanted)} on, but {graph.path} has no edge weights; ingest them, or turn it off"
        )


def _check_shares(config: RunConfig, graph: GraphStore) -> None:
    """Nobody may be left without work: each replica has items, each chunk nodes."""
    if config.mode == "chunked":
        chunked = config.chunked
        is_open = chunked.devices is not None and (chunked.stages, chunked.parts) == (1, 1)
        parts = chunked.devices if is_open else chunked.parts  # all splits of the devices are tried
        require_filled(graph, parts or 1, chunked.chunks)
        return
    replicas, items = config.cluster.replicas, count_items(graph, "train", config.sampler.batch_size)
    Deal(replicas=replicas, rank=replicas - 1, group_items=config.train.accumulate, epoch_items=items)


def _check_data(config: RunConfig, graph: GraphStore) -> None:
    if not len(graph.split_ids("train")):
        raise DataError(f"{graph.path} has no train nodes; ingest it with some, for example by split_fractions")
    if not graph.meta.num_classes or not has_labels(graph, "train"):
        raise DataError(f"{graph.path} has no label on any train node; ingest it with labels, as {_LABELS}")
    train = config.train
    if train.patience is not None and not (
        train.evaluate_every and config.evaluate.mode != "none" and has_labels(graph, "valid")
    ):
        raise ValueError(
            f"patience={train.patience} needs an evaluation of valid; give the graph labelled valid nodes and set "
            "evaluate_every >= 1, or patience to none"
        )
    if config.mode == "sampled" and config.sampler.weighted and not graph.meta.has_edge_weights:
        raise ValueError(
            f"sampler.weighted=true, but {graph.path} has no edge weights; ingest them, or set weighted=false"
        )


_LABELS = "column `label` or another that label_column names"
