"""How many pods a run has on Kubernetes, and what each needs: budgets and threads are those of one replica."""

import math
from dataclasses import dataclass, replace

from penstock.config import RunConfig
from penstock.launch_options import KubernetesOptions
from penstock.portable import spans_ray
from penstock.storage.budget import GIB, parse_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What one pod gets."""

    cpus: int
    gpus: int
    memory_bytes: int
    scratch_bytes: int


def is_rayjob(config: RunConfig, options: KubernetesOptions) -> bool:
    """Whether Ray places the run; ValueError where the wanted kind cannot have it."""
    kind = options.kind or ("rayjob" if spans_ray(config) else "job")
    joins = config.cluster.address not in (None, "local") or config.chunked.backend == "ray"
    if kind == "job" and (joins or config.cluster.feeders or (options.workers or 1) > 1):
        raise ValueError(
            "--kind job is one pod without a cluster; leave out feeders, workers, --ray and its backend, or the kind"
        )
    return kind == "rayjob"


def pod_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """Per pod: budgets with room for Python, torch, the model, and page tables, for each replica in it."""
    host, disk = config.budgets.host_memory, config.budgets.disk
    memory = 16 * GIB if host is None else host + host // 4 + 2 * GIB
    scratch = 100 * GIB if disk is None else disk + disk // 4
    count = _replicas_per_pod(config, options)
    gpus = count if is_rayjob(config, options) else 1  # replicas that are processes share a GPU
    return Sizes(
        cpus=options.cpus or (config.train.threads or 4) * count,
        gpus=options.gpus if options.gpus is not None else gpus * config.train.device.startswith("cuda"),
        memory_bytes=parse_bytes(options.memory) if options.memory else memory * count,
        scratch_bytes=parse_bytes(options.scratch_size) if options.scratch_size else scratch * count,
    )


def _replicas_per_pod(config: RunConfig, options: KubernetesOptions) -> int:
    """Budgets and threads of sampled training are a replica's."""
    if config.mode == "chunked":
        return 1
    replicas = config.cluster.replicas
    return math.ceil(replicas / (options.workers or replicas)) if is_rayjob(config, options) else replicas


def count_workers(config: RunConfig) -> int:
    """Pods that train: one per replica or rank."""
    chunked = config.chunked
    ranks = (chunked.devices or chunked.stages * chunked.parts) if config.mode == "chunked" else 1
    return config.cluster.replicas * ranks


def feeder_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """A feeder takes a quarter of its pod's free memory, and what `feeder_disk` says, beside its copy of the graph."""
    one = pod_sizes(config, replace(options, workers=None))
    scratch = max(config.cluster.feeder_disk or 0, one.scratch_bytes)
    return replace(one, cpus=config.cluster.feeder_threads, gpus=0, scratch_bytes=scratch)
