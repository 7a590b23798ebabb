"""Manifests for Kubernetes: a RayJob for KubeRay 1.7, or a Job of one pod for runs that need no Ray.

Pods run without root, capabilities, a writable root file system, a service account's token, or io_uring (the
runtime's default seccomp profile refuses it). Ray wants its token for everything. The dashboard listens within the
pod network, since KubeRay's operator asks it how the job is; a network policy lets nobody else in.
"""

import math
import re
from importlib import metadata
from pathlib import PurePosixPath
from typing import Any

import xxhash
import yaml

from penstock import __version__
from penstock.config import RunConfig
from penstock.exit_codes import DATA, DOES_NOT_FIT, MISSING, RETRY, USAGE
from penstock.launch_options import KubernetesOptions
from penstock.mounts import claim_mounts, refuse_read_only, refuse_unmounted, refuse_unshared, unmounted
from penstock.pod_sizes import Sizes, count_workers, feeder_sizes, head_sizes, is_rayjob, pod_sizes
from penstock.portable import portable_config
from penstock.storage.budget import GIB, MIB
from penstock.storage.remote.config import is_uri

Json = dict[str, Any]

TESTED_RAY = "2.60.0"
CONFIG_FILE = "/etc/penstock/run.yaml"
SCRATCH = "/scratch"
_USER = 10001  # the Dockerfile's
_GRACE_S = 120  # for a checkpoint after SIGTERM
_SHM = GIB  # Ray's object store and gloo; features do not pass through either
_OBJECT_STORE = 256 * MIB
_NAME_LENGTH = 47  # KubeRay's limit for RayJobs
_ATTEMPTS = 3
_COMMAND = ["penstock", "train", "-c", CONFIG_FILE]
_RAY_PARAMS = {"object-store-memory": str(_OBJECT_STORE)}
_ENVIRONMENT = {
    "HOME": "/tmp",
    "PYTHONSAFEPATH": "1",
    "NUMBA_CACHE_DIR": "/tmp/numba",
    "MPLCONFIGDIR": "/tmp/matplotlib",
    "RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_S),  # Ray's own is 3 s, too short for a checkpoint
}
_INSTANCE = "app.kubernetes.io/instance"


def render(config: RunConfig, options: KubernetesOptions) -> str:
    """The manifests as YAML documents; ValueError where an option is wrong or the configuration holds a secret."""
    name = _name(config, options)
    rayjob = is_rayjob(config, options)
    _refuse_without_effect(options, rayjob)
    refuse_read_only(config, options)
    refuse_unshared(config, options, rayjob)
    refuse_unmounted(config, options)
    documents = [
        _config_map(name, config, rayjob),
        _rayjob(name, config, options) if rayjob else _job(name, config, options),
    ]
    if rayjob:
        documents.append(_network_policy(name))
    if options.namespace:
        for document in documents:
            document["metadata"]["namespace"] = options.namespace
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, explicit_start=True)


def _refuse_without_effect(options: KubernetesOptions, rayjob: bool) -> None:
    """ValueError for options that only the other kind of manifest has a place for."""
    alone = {"--workers": options.workers, "--ray-version": options.ray_version, "--auth-secret": options.auth_secret}
    given = [name for name, value in alone.items() if value is not None]
    if given and not rayjob:
        raise ValueError(f"{', '.join(given)}: of no effect in a Job, which is one pod without Ray; leave it out")


def cautions(config: RunConfig, options: KubernetesOptions) -> list[str]:
    """What the manifests alone cannot make right."""
    value, found = portable_config(config), unmounted(config, options)
    if options.image is None:
        found.append(
            f"image {_image(config, options)} is in no registry; build deploy/Dockerfile, push it, give --image"
        )
    if is_uri(value["dataset"]) and options.scratch_size is None:
        size = _quantity(pod_sizes(config, options).scratch_bytes)
        found.append(
            f"{SCRATCH} has {size}, also for the local copy of {value['dataset']}; give --scratch-size if more"
        )
    return found


def _name(config: RunConfig, options: KubernetesOptions) -> str:
    if options.name is not None:
        if len(options.name) > _NAME_LENGTH or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", options.name):
            raise ValueError(
                f"--name {options.name!r}: write at most {_NAME_LENGTH} of a-z, 0-9 and hyphens, a letter first"
            )
        return options.name
    place = (config.results_uri or str(config.results_dir.absolute())).rstrip("/")
    words = re.sub(r"[^a-z0-9]+", "-", f"penstock-{place.rsplit('/', 1)[-1].lower()}")
    # two runs called `daily` are two runs, and applying one must not replace the other
    digest = xxhash.xxh3_64_hexdigest(place.encode())[:8]
    return f"{words[: _NAME_LENGTH - len(digest) - 1].strip('-')}-{digest}"


def _image(config: RunConfig, options: KubernetesOptions) -> str:
    return options.image or f"penstock:{__version__}{'-cuda' if pod_sizes(config, options).gpus else ''}"


def _config_map(name: str, config: RunConfig, rayjob: bool) -> Json:
    """The configuration, with packs and local copies on the scratch volume."""
    value = portable_config(config, compact=True)
    value.setdefault("remote", {}).setdefault("stage_dir", SCRATCH)
    if rayjob:
        cluster = value.setdefault("cluster", {})
        cluster["address"] = "auto"  # of the cluster that the job runs in
        if config.cluster.feeders:
            cluster["feeder_resources"] = _feeder_resources(config)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-config", "labels": _labels(name)},
        "data": {"run.yaml": yaml.safe_dump(value, sort_keys=False)},
    }


def _feeder_resources(config: RunConfig) -> dict[str, float]:
    """Feeders go where this is, which the pods of their group have."""
    return config.cluster.feeder_resources or {"feeder": 1.0}


def _rayjob(name: str, config: RunConfig, options: KubernetesOptions) -> Json:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "entrypoint": " ".join(_COMMAND),
            "entrypointNumCpus": 0,
            "submissionMode": "K8sJobMode",
            "backoffLimit": _ATTEMPTS - 1,  # each retry is a new cluster, and the run goes on from its folder
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "submitterPodTemplate": _submitter(name, config, options),
            "rayClusterSpec": _cluster(name, config, options),
        },
    }


def _cluster(name: str, config: RunConfig, options: KubernetesOptions) -> Json:
    """A head for the driver, a group of pods that train, and one that feeds."""
    sizes = pod_sizes(config, options)
    num_workers = options.workers or count_workers(config)
    groups = [_group(name, "workers", num_workers, config, options, sizes, config.cluster.replica_resources)]
    if config.cluster.feeders:
        sizes_there, resources = feeder_sizes(config, options), _feeder_resources(config)
        groups.append(_group(name, "feeders", config.cluster.feeders, config, options, sizes_there, resources))
    return {
        "rayVersion": options.ray_version or _installed_ray(),
        "authOptions": {"mode": "token"} | ({"secretName": options.auth_secret} if options.auth_secret else {}),
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # no task goes to the head, which has the driver; KubeRay's operator asks the dashboard over the pod network
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0", **_RAY_PARAMS},
            "template": _pod(name, "ray-head", config, options, head_sizes(config, options)),
        },
        "workerGroupSpecs": groups,
    }


def _group(
    name: str,
    group: str,
    replicas: int,
    config: RunConfig,
    options: KubernetesOptions,
    sizes: Sizes,
    resources: dict[str, float],
) -> Json:
    """Pods of one kind; cores and GPUs are told to Ray by their limits, `resources` by themselves."""
    value: Json = {"groupName": group, "replicas": replicas, "minReplicas": replicas, "maxReplicas": replicas}
    if resources:
        value["resources"] = {key: f"{amount:g}" for key, amount in resources.items()}
    return value | {
        "rayStartParams": dict(_RAY_PARAMS),
        "template": _pod(name, "ray-worker", config, options, sizes),
    }


def _installed_ray() -> str:
    try:
        return metadata.version("ray")
    except metadata.PackageNotFoundError:
        return TESTED_RAY


def _job(name: str, config: RunConfig, options: KubernetesOptions) -> Json:
    """One pod, tried again after a preemption or a crash, but not where only another configuration would help."""
    template = _pod(name, "penstock", config, options, pod_sizes(config, options))
    template["spec"]["containers"][0]["args"] = _COMMAND[1:]
    template["spec"]["containers"][0]["command"] = _COMMAND[:1]
    for_good = [USAGE, DATA, DOES_NOT_FIT, MISSING]
    on = {"containerName": "penstock", "operator": "In"}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "backoffLimit": _ATTEMPTS,
            "completions": 1,
            "parallelism": 1,
            "ttlSecondsAfterFinished": 86400,
            "podFailurePolicy": {
                "rules": [
                    {"action": "FailJob", "onExitCodes": {**on, "values": for_good}},
                    {"action": "Ignore", "onExitCodes": {**on, "values": [RETRY]}},  # does not count as an attempt
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": template,
        },
    }


def _pod(name: str, container: str, config: RunConfig, options: KubernetesOptions, sizes: Sizes) -> Json:
    """A pod template with one container, whose root file system is read-only."""
    limits = {"cpu": str(sizes.cpus), "memory": _quantity(sizes.memory_bytes)}
    scratch: Json = {"emptyDir": {"sizeLimit": _quantity(sizes.scratch_bytes)}}
    requests = dict(limits)
    if options.storage_class:
        scratch = {"ephemeral": {"volumeClaimTemplate": {"spec": _claim(options.storage_class, sizes.scratch_bytes)}}}
    else:
        requests["ephemeral-storage"] = _quantity(sizes.scratch_bytes)
    if sizes.gpus:
        limits["nvidia.com/gpu"] = requests["nvidia.com/gpu"] = str(sizes.gpus)
    claims = [mount["name"] for mount in claim_mounts(options)]
    value = _container(container, config, options) | {"resources": {"requests": requests, "limits": limits}}
    value["volumeMounts"] = [
        {"name": "config", "mountPath": str(PurePosixPath(CONFIG_FILE).parent), "readOnly": True},
        {"name": "scratch", "mountPath": SCRATCH},
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shared-mem", "mountPath": "/dev/shm"},  # KubeRay's name for it
        *claim_mounts(options),
    ]
    volumes = [
        {"name": "config", "configMap": {"name": f"{name}-config"}},
        {"name": "scratch", **scratch},
        {"name": "tmp", "emptyDir": {"sizeLimit": "10Gi"}},
        {"name": "shared-mem", "emptyDir": {"medium": "Memory", "sizeLimit": _quantity(_SHM)}},
        *({"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in dict.fromkeys(claims)),
    ]
    return _template(name, value, options, volumes, restarts=None if container.startswith("ray") else "Never")


def _submitter(name: str, config: RunConfig, options: KubernetesOptions) -> Json:
    """The pod of `ray job submit`; KubeRay adds the command and the token."""
    value = _container("ray-job-submitter", config, options) | {
        "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return _template(name, value, options, [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}], restarts="Never")


def _template(
    name: str, container: Json, options: KubernetesOptions, volumes: list[Json], restarts: str | None
) -> Json:
    spec: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "terminationGracePeriodSeconds": _GRACE_S,
        "containers": [container],
        "volumes": volumes,
    }
    if restarts:
        spec["restartPolicy"] = restarts
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    return {"metadata": {"labels": _labels(name)}, "spec": spec}


def _container(container: str, config: RunConfig, options: KubernetesOptions) -> Json:
    value: Json = {
        "name": container,
        "image": _image(config, options),
        "env": [{"name": key, "value": text} for key, text in _ENVIRONMENT.items()],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if options.env_secret:
        value["envFrom"] = [{"secretRef": {"name": options.env_secret}}]
    return value


def _claim(storage_class: str, num_bytes: int) -> Json:
    return {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage_class,
        "resources": {"requests": {"storage": _quantity(num_bytes)}},
    }


def _network_policy(name: str) -> Json:
    """Only pods of this run, and KubeRay's operator at the dashboard, may connect; anybody may read metrics."""
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "labels": _labels(name)},
        "spec": {
            "podSelector": {"matchLabels": {_INSTANCE: name}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {_INSTANCE: name}}}]},
                {"from": [operator], "ports": [{"port": 8265, "protocol": "TCP"}]},
                {"from": [{"namespaceSelector": {}}], "ports": [{"port": 8080, "protocol": "TCP"}]},
            ],
        },
    }


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": "penstock", _INSTANCE: name}


def _quantity(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / MIB)}Mi" if num_bytes % GIB else f"{num_bytes // GIB}Gi"


class _Dumper(yaml.SafeDumper):
    """Writes texts of many lines as blocks, and nothing as an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
