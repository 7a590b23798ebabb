"""What every key of the configuration means, in a line: the one place that `penstock config` and the documents have it
from. Types and defaults come from the models, where a key is read from `effects`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Meaning:
    """`default` says in words what stands for a default that is derived."""

    text: str
    default: str | None = None


_Text = str | tuple[str, str]
_TEXTS: dict[str, _Text] = {
    "dataset": "graph store, a folder or a URI",
    "run_dir": "folder or URI of the run",
    "experiment": "name of an [experiment](#experiments) in the run folder",
    "mode": "`chunked` trains on the whole graph, by chunks; see [full graph](full-graph.md)",
    "feed": "`memory` holds all features in memory: same items, losses and weights",
    "sampled_epochs": "epochs sampled ahead and cycled in `reuse` mode",
    "budgets.host_memory": (
        "memory for tiers, buffers, evaluation, like `4GiB`",
        "what the container's limit leaves beside the process; without a limit at most half of what is free",
    ),
    "budgets.device_memory": ("bytes of rows kept on the device", "0; half of what is free on CUDA"),
    "budgets.disk": ("bytes of packs and scratch", "nine tenths of what is free"),
    "sampler.fanouts": ("neighbours per layer, input side first (DGL's order); -1 takes all", "[10, 10]"),
    "sampler.num_neighbors": "the same, seeds' neighbours first (PyG's order); give one of the two",
    "sampler.method": "`labor`: layer-dependent sampling, with fewer distinct rows per item",
    "sampler.replace": "draw with replacement",
    "sampler.weighted": (
        "draw in proportion to edge weights, which are finite and not negative (edges of weight zero are never drawn)"
    ),
    "sampler.batch_size": "seeds per item",
    "sampler.seed": "seed of the items",
    "sampler.degrees": (
        "record whole-graph degrees, so that the packs serve every kind of model",
        "where the model reads them",
    ),
    "sampler.mode": "`item`, or `hop` for topologies larger than memory: the same items",
    "sampler.window_items": ("items per window", "from memory"),
    "plan.policy": "who sits in the host tier; `static` is DiskGNN's",
    "plan.mode": "`reuse` cycles packs of a few sampled epochs, `rolling` samples and packs ahead of the trainer",
    "plan.row_dtype": ("type of the rows in packs", "as stored"),
    "model.kind": "kind of layers",
    "model.num_layers": ("layers", "one per fanout; chunked: 3"),
    "model.hidden": "width of the hidden layers",
    "model.aggregator": "how SAGE aggregates",
    "model.edge_weights": (
        "SAGE's mean is weighted by edge weights, see [concepts](concepts.md#edge-weights)",
        "`sampler.weighted`",
    ),
    "model.heads": "heads of GAT",
    "model.dropout": "of hidden rows",
    "model.input_dropout": "of the features",
    "model.attention_dropout": "of GAT's attention",
    "model.norm": ("norm between layers", "`none`; `layer` for resgcn"),
    "model.residual": "add a hidden layer's input to its output",
    "model.activation": "between layers",
    "model.alpha": "of GCNII: share of the initial rows",
    "model.theta": "of GCNII: layer l's matrix counts log(theta / l + 1)",
    "model.module": "import path `pkg.mod:Class` of your `nn.Module`, see [models](models.md)",
    "model.kwargs": "its arguments",
    "train.optimizer": "of torch",
    "train.lr": "learning rate",
    "train.weight_decay": "weight decay",
    "train.momentum": "momentum",
    "train.schedule": "of the learning rate",
    "train.warmup_steps": "optimizer steps in which the rate rises to `lr`",
    "train.decay": "factor of the rate",
    "train.decay_epochs": "epochs between two factors",
    "train.grad_clip": "largest norm of a gradient",
    "train.epochs": "epochs to train",
    "train.seed": "seed of initial weights and dropout",
    "train.accumulate": ("items per optimizer step, over all replicas", "one per replica"),
    "train.precision": "of computing; `float16` on CUDA",
    "train.metric": "what early stopping watches",
    "train.patience": "evaluations without a better one after which training stops",
    "train.evaluate_every": "epochs between evaluations on the valid split; 0 evaluates at the end",
    "train.checkpoint_items": "items after which a checkpoint is written, at least",
    "train.checkpoint_minutes": (
        "minutes after which one is written, at least; the first comes with the first epoch or after two seconds, "
        "later ones after as long again"
    ),
    "train.keep_checkpoints": "checkpoints that are kept",
    "train.log_every": "items between two lines of `metrics.jsonl`",
    "train.threads": ("threads for sampling, packing and compute", "all cores"),
    "train.device": "`cpu` or `cuda`",
    "chunked.chunks": "chunks that the nodes are cut into",
    "chunked.stages": "ranks that the layers are split over; ranks are stages x parts",
    "chunked.parts": "ranks that the nodes are split over",
    "chunked.devices": "ranks in all; stages and parts are then chosen by predicted time",
    "chunked.backend": "what ranks are",
    "chunked.partition": "who cuts the graph",
    "chunked.partition_seed": "seed of a random cut",
    "chunked.gradient_mode": "gradients between chunks, see [full graph](full-graph.md)",
    "chunked.mix_beta": "share of stale gradients in mode `mix`",
    "chunked.updates_per_epoch": "optimizer steps per epoch; more than one in mode `drop` only",
    "chunked.history_period": ("epochs for which histories stay", "1 (`gnnpipe`: 23)"),
    "chunked.history_init": ("where histories start", "`exact` (`gnnpipe`: `zero`)"),
    "chunked.history_dtype": "type of the rows of histories",
    "chunked.history_storage": "where histories lie",
    "chunked.push": "`ema`: histories are moving averages",
    "chunked.ema_gamma": "share of the new row in a moving average",
    "chunked.refresh_every": "make histories exact every so many epochs; 0: never",
    "chunked.recompute": "compute activations again for the backward pass, to keep fewer",
    "chunked.defer_weights": "later stages put weight gradients off",
    "chunked.shuffle_chunks": "another order of chunks in every epoch",
    "chunked.cycle_orders": "orders that are cycled",
    "chunked.checkpoint": "`light` has no histories",
    "chunked.timeout_s": "seconds after which a silent rank is an error",
    "chunked.retries": "how often all ranks start anew from the newest checkpoint after one died",
    "cluster.replicas": "replicas of the model, see [cluster](cluster.md)",
    "cluster.address": "Ray: `auto`, `local` or `host:port`; without it replicas are processes of this machine",
    "cluster.gpus_per_replica": (
        "GPUs that Ray is asked for; less than 1 lets replicas share one",
        "one per rank on CUDA",
    ),
    "cluster.replica_resources": 'Ray\'s custom resources that a replica wants, `{"trainer": 1}`',
    "cluster.feeders": "processes that sample and pack for replicas, see [feeders](feeders.md)",
    "cluster.feeder_threads": "threads of each",
    "cluster.feeder_disk": ("bytes of disk of each", "a tenth of what is free"),
    "cluster.feeder_resources": "Ray's custom resources that a feeder wants",
    "cluster.retries": "how often all replicas start anew from the newest checkpoint",
    "cluster.timeout_s": "seconds for which nothing may move",
    "cluster.wait_s": ("seconds for which a Ray cluster may have no room: an autoscaler takes minutes to bring a node"),
    "remote.dataset": "URI of the graph store; set by giving one as dataset, see [remote](remote.md)",
    "remote.run_dir": "URI of the run folder; set by giving one as run folder",
    "remote.stage_dir": (
        "local copies of remote data; packs and scratch of replicas, where it is given",
        "`~/.cache/penstock`",
    ),
    "track.trackers": "`tensorboard`, `mlflow`, `wandb`, see [observability](observability.md)",
    "track.trace_steps": "steps (first, stop) of which `timeline.json` is written, for Perfetto",
    "evaluate.mode": "`exact`: all neighbours, layer by layer through disk",
    "evaluate.fanouts": ("neighbours per layer when evaluating", "as in training"),
    "evaluate.memory_share": "share of the host memory that evaluation keeps for itself",
}
MEANINGS = {key: Meaning(text) if isinstance(text, str) else Meaning(*text) for key, text in _TEXTS.items()}
