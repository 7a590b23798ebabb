"""Where things lie that are not on local disk, and where their local copies go."""

from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, field_validator

from penstock.storage.remote.uris import check_uri

DEFAULT_STAGE_DIR = Path.home() / ".cache" / "penstock"


class RemoteConfig(BaseModel):
    """URIs of the graph store and of the run folder where they are remote, and the folder of local copies.

    Replicas keep packs and scratch under `stage_dir` too, where it is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str | None = None
    run_dir: str | None = None
    stage_dir: Path | None = None

    @field_validator("dataset", "run_dir")
    @classmethod
    def _check(cls, value: str | None) -> str | None:
        return None if value is None else check_uri(value)


def is_uri(location: object) -> bool:
    """Whether a location is a URI and not a path."""
    return isinstance(location, str) and "://" in location


def local_copy(uri: str, kind: str, stage_dir: Path | None) -> Path:
    """Where the local copy of a URI lies: the same for every process of a host."""
    name = uri.rstrip("/").rsplit("/", 1)[-1].rsplit("@", 1)[-1]  # credentials are refused, but elsewhere
    digest = xxhash.xxh3_64_hexdigest(uri.rstrip("/").encode())
    return (stage_dir or DEFAULT_STAGE_DIR) / kind / f"{name}-{digest}"
