"""Options of the verbs that run something elsewhere; light, since every start of the command line reads them."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Group, Parameter


@Parameter(name="*", group=Group("Job", sort_key=8))
@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """Where a job is submitted to, and whether to wait for it."""

    address: str | None = None
    "The dashboard, like http://HOST:8265. Default: RAY_API_SERVER_ADDRESS, else this machine's."
    wait: Annotated[bool, Parameter(negative="--no-wait")] = True
    "Follow the log and exit as the job does; Ctrl-C leaves it running."
    json: bool = False
    "Print JSON at the end; the log goes to stderr."


@Parameter(name="*", group=Group("Manifest", sort_key=8))
@dataclass(frozen=True, kw_only=True)
class KubernetesOptions:
    """What a manifest needs beyond the configuration; what is not given is derived from it."""

    kind: Literal["rayjob", "job"] | None = None
    "A RayJob of KubeRay, or a plain Job of one pod. Default: rayjob where the run uses Ray, else job."
    name: str | None = None
    "Name of the objects. Default: penstock- and the run folder's name."
    namespace: str | None = None
    "Namespace of the objects. Default: the one of kubectl's context."
    image: str | None = None
    "Image with Penstock, built from deploy/Dockerfile."
    ray_version: str | None = None
    "Ray in the image. Default: the one installed here."
    workers: int | None = None
    "Pods that train. Default: one per replica or rank."
    cpus: int | None = None
    "Cores per pod. Default: train.threads, else 4, for each replica in it."
    gpus: int | None = None
    "GPUs per pod that trains. Default: 1 (Ray: for each replica in it) where train.device is cuda."
    memory: str | None = None
    """Memory per pod. Default: what `penstock plan` predicted in the run folder for one process on the CPU; else, for
    each replica in it: budgets.host_memory, a quarter more and 2 GiB; else 16GiB."""
    scratch_size: str | None = None
    "Disk per pod for packs, copies and run. Default, for each replica in it: budgets.disk and a quarter; else 100GiB."
    storage_class: str | None = None
    "Storage class of the scratch volumes, for example of local NVMe. Default: an emptyDir on the node's disk."
    volume: Annotated[list[str], Parameter(show_default=False)] = field(default_factory=list)
    "Mount a PersistentVolumeClaim, claim:/path or claim:/path:ro. May be repeated."
    auth_secret: str | None = None
    "Secret with Ray's token under the key auth_token. Default: KubeRay makes one for each cluster."
    env_secret: str | None = None
    "Secret whose keys become environment variables: credentials of the storage and of trackers."
    service_account: str | None = None
    "Service account of the pods, for workload identity; its token is not mounted."
    allow_unmounted: bool = False
    "Print manifests also where the dataset or the run folder is a path on no volume: the image's own, or to be lost."
