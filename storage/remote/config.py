"""Where things lie that are not on local disk, and where their local copies go."""

import os
from pathlib import Path

import xxhash
from pydantic import BaseModel, ConfigDict, field_validator

from penstock.storage.remote.uris import check_uri


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


def default_stage_dir() -> Path:
    """`~/.cache/penstock`; ValueError where this user has no home folder, or one that cannot be written to."""
    home = Path(os.path.expanduser("~"))  # "~" itself where neither HOME nor the password file knows one
    place = next(
        path for path in (home / ".cache" / "penstock", home / ".cache", home) if path == home or path.exists()
    )
    if not (home.is_absolute() and place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(
            f"local copies of remote data would go to {home / '.cache' / 'penstock'}, which cannot be written to; give "
            "--stage-dir (remote.stage_dir), or set HOME"
        )
    return home / ".cache" / "penstock"


def local_copy(uri: str, kind: str, stage_dir: Path | None) -> Path:
    """Where the local copy of a URI lies: the same for every process of a host."""
    name = uri.rstrip("/").rsplit("/", 1)[-1].rsplit("@", 1)[-1]  # credentials are refused, but elsewhere
    digest = xxhash.xxh3_64_hexdigest(uri.rstrip("/").encode())
    return (stage_dir or default_stage_dir()) / kind / f"{name}-{digest}"
