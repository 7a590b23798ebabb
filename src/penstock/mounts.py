"""Volumes of pods: what lies on them, and what is refused since it would not."""

import re
from pathlib import PurePosixPath
from typing import Any

from penstock.config import RunConfig
from penstock.launch_options import KubernetesOptions
from penstock.portable import portable_config
from penstock.storage.remote.config import is_uri

Json = dict[str, Any]


def claim_mounts(options: KubernetesOptions) -> list[Json]:
    """Mounts of `--volume claim:/path`; ValueError where one is written otherwise."""
    mounts = []
    for text in options.volume:
        match = re.fullmatch(r"([a-z0-9]([-a-z0-9]*[a-z0-9])?):(/[^:]+?)(:ro)?", text)
        if match is None:
            raise ValueError(f"--volume {text!r}: write claim:/path or claim:/path:ro")
        mount: Json = {"name": match[1], "mountPath": match[3]}
        mounts.append(mount | ({"readOnly": True} if match[4] else {}))
    return mounts


def refuse_read_only(config: RunConfig, options: KubernetesOptions) -> None:
    """ValueError where the run folder is on a volume that cannot be written."""
    place = portable_config(config)["run_dir"]
    for mount in claim_mounts(options):
        if mount.get("readOnly") and not is_uri(place) and PurePosixPath(place).is_relative_to(mount["mountPath"]):
            raise ValueError(f"run_dir={place} is on {mount['name']}:{mount['mountPath']}:ro; mount it without `:ro`")


def _is_mounted(place: str, options: KubernetesOptions) -> bool:
    mounts = [PurePosixPath(mount["mountPath"]) for mount in claim_mounts(options)]
    return not is_uri(place) and any(PurePosixPath(place).is_relative_to(mount) for mount in mounts)


def refuse_unshared(config: RunConfig, options: KubernetesOptions, rayjob: bool) -> None:
    """ValueError where ranks of full-graph training would each look into a scratch volume of their own."""
    value = portable_config(config)
    apart = [f"{key}={value[key]}" for key in ("dataset", "run_dir") if not _is_mounted(value[key], options)]
    if rayjob and config.mode == "chunked" and apart:
        raise ValueError(
            f"{', '.join(apart)} with mode=chunked: the driver and all ranks read the same files, and each pod would "
            "have a copy of its own, or none; give paths on a volume that all pods mount (--volume CLAIM:/path, "
            "ReadWriteMany), or --kind job with backend processes"
        )


def refuse_unmounted(config: RunConfig, options: KubernetesOptions) -> None:
    """ValueError where a pod would not find what it reads, or loses what it writes."""
    found = unmounted(config, options)
    if found and not options.allow_unmounted:
        raise ValueError(
            f"{'; '.join(found)}; give URIs, or mount volumes with --volume CLAIM:/path (or --allow-unmounted, where "
            "the image has the files, or the run may be lost)"
        )


def unmounted(config: RunConfig, options: KubernetesOptions) -> list[str]:
    """What is on no volume, and what comes of it."""
    value = portable_config(config)
    losses = {
        "dataset": "it is not in the pods",
        "run_dir": "it is lost with its pod, and with it what it could resume",
    }
    return [
        f"{key} {value[key]} is on no mounted volume, so {loss}"
        for key, loss in losses.items()
        if not is_uri(value[key]) and not _is_mounted(value[key], options)
    ]
