"""A run's configuration as another machine needs it."""

from pathlib import Path
from typing import Any

from penstock.config import RunConfig
from penstock.storage.redaction import refuse_secrets


def portable_config(config: RunConfig, *, compact: bool = False) -> dict[str, Any]:
    """The configuration as another machine reads it: paths absolute, URIs as they were given.

    `compact` leaves out what has its default value. ValueError where it holds a secret.
    """
    value: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=compact)
    remote = value.get("remote", {})
    for name in ("dataset", "run_dir"):
        uri = remote.pop(name, None)
        value[name] = uri or str(Path(value[name]).absolute())
    if remote.get("stage_dir") is not None:
        remote["stage_dir"] = str(Path(remote["stage_dir"]).absolute())
    refuse_secrets(value)
    return value


def spans_ray(config: RunConfig) -> bool:
    """Whether Ray places the run's processes; else it is one process, or children of one."""
    cluster = config.cluster
    is_wide = cluster.replicas > 1 or cluster.feeders > 0
    return is_wide or cluster.address is not None or (config.mode == "chunked" and config.chunked.backend == "ray")
