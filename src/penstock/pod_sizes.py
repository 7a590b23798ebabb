"""How many pods a run has on Kubernetes, and what each needs: budgets and threads are those of one replica."""

import math
from dataclasses import dataclass, replace

from penstock.config import RunConfig
from penstock.launch_options import KubernetesOptions
from penstock.planned import planned_memory
from penstock.portable import spans_ray
from penstock.storage.budget import GIB, MIB, parse_bytes
from penstock.storage.manifest import read_json

_PROCESS_BYTES = 2 * GIB  # beside the budget
_HEAD_BYTES = 8 * GIB  # Ray's own processes, and a driver that maps the graph
_FEEDER_BYTES = 4 * GIB  # at least


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
    if kind == "job" and (joins or config.cluster.feeders):
        raise ValueError(
            "--kind job is one pod without a cluster; leave out feeders, --ray and its backend, or the kind"
        )
    return kind == "rayjob"


def pod_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """Per pod that trains; what is not given follows from the configuration."""
    found = _chunked_sizes(config, options) if config.mode == "chunked" else _sampled_sizes(config, options)
    if not config.train.device.startswith("cuda"):
        found = replace(found, gpus=0)
    return Sizes(
        cpus=options.cpus or found.cpus,
        gpus=found.gpus if options.gpus is None else options.gpus,
        memory_bytes=parse_bytes(options.memory) if options.memory else found.memory_bytes,
        scratch_bytes=parse_bytes(options.scratch_size) if options.scratch_size else found.scratch_bytes,
    )


def _planned_bytes(config: RunConfig) -> int | None:
    """Whole MiB that `penstock plan` predicted for one process on the CPU with the budget that is given now; None where
    the run folder does not say."""
    host, found = config.budgets.host_memory, planned_memory(config.run_dir)
    alone = config.cluster.replicas == 1 and not config.train.device.startswith("cuda")
    if host is None or found is None or not alone:
        return None
    planned_with = read_json(config.run_dir / "machine.json", keys=("budgets",))["budgets"]["host_bytes"]
    return -(-int(found["predicted_peak_bytes"]) // MIB) * MIB if planned_with == host else None


def _one_pod(config: RunConfig) -> Sizes:
    """What was planned, or else budgets with room for Python, torch, the model, and page tables, in one process."""
    host, disk = config.budgets.host_memory, config.budgets.disk
    return Sizes(
        cpus=config.train.threads or 4,
        gpus=1,
        memory_bytes=_planned_bytes(config) or (16 * GIB if host is None else host + host // 4 + _PROCESS_BYTES),
        scratch_bytes=100 * GIB if disk is None else disk + disk // 4,
    )


def _sampled_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """Budgets and threads are a replica's; replicas that are processes of one pod share a GPU."""
    one, replicas, gpus = _one_pod(config), config.cluster.replicas, 1
    here = replicas
    if is_rayjob(config, options):
        here = math.ceil(replicas / (options.workers or replicas))
        gpus = math.ceil(here * (config.cluster.gpus_per_replica or 1))
    return Sizes(
        cpus=one.cpus * here, gpus=gpus, memory_bytes=one.memory_bytes * here, scratch_bytes=one.scratch_bytes * here
    )


def _chunked_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """Budgets and threads are those of all ranks together."""
    one, ranks = _one_pod(config), count_workers(config)
    if not is_rayjob(config, options):
        return one
    here = math.ceil(ranks / (options.workers or ranks))
    share = config.cluster.replicas * (config.cluster.gpus_per_replica or ranks / config.cluster.replicas) / ranks
    memory = one.memory_bytes
    if config.budgets.host_memory is not None:
        memory = (memory - _PROCESS_BYTES) * here // ranks + _PROCESS_BYTES * here
    cpus = one.cpus if config.train.threads is None else max(1, one.cpus // ranks) * here
    return replace(one, cpus=cpus, gpus=math.ceil(here * share), memory_bytes=memory)


def count_workers(config: RunConfig) -> int:
    """Pods that train: one per replica or rank."""
    chunked = config.chunked
    ranks = (chunked.devices or chunked.stages * chunked.parts) if config.mode == "chunked" else 1
    return config.cluster.replicas * ranks


def head_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """The driver, without a GPU: its budget is the run's where it cuts the graph or evaluates exactly."""
    one = pod_sizes(config, replace(options, workers=None))
    memory = _one_pod(config).memory_bytes
    if config.mode == "sampled" and config.evaluate.mode != "exact":
        memory = min(memory, _HEAD_BYTES)
    return replace(one, gpus=0, memory_bytes=one.memory_bytes if options.memory else memory)


def feeder_sizes(config: RunConfig, options: KubernetesOptions) -> Sizes:
    """A feeder takes a quarter of its pod's free memory, and what `feeder_disk` says, beside its copy of the graph: of
    memory, half of what a trainer has does."""
    one = pod_sizes(config, replace(options, workers=None))
    scratch = max(config.cluster.feeder_disk or 0, one.scratch_bytes)
    memory = one.memory_bytes if options.memory else max(one.memory_bytes // 2, _FEEDER_BYTES)
    return replace(one, cpus=config.cluster.feeder_threads, gpus=0, memory_bytes=memory, scratch_bytes=scratch)
