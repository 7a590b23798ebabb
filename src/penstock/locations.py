"""Where data lies: verbs take folders and URIs alike, and work on local copies of what is remote."""

import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.storage.errors import DataError, InUse
from penstock.storage.graph import FEATURE_SUMS, seal_graph
from penstock.storage.manifest import MANIFEST
from penstock.storage.progress import Progress, silent
from penstock.storage.remote.config import is_uri, local_copy
from penstock.storage.remote.files import RemoteError, open_remote
from penstock.storage.remote.hostlock import flocked
from penstock.storage.remote.pull import fetch
from penstock.storage.remote.stage import read_remote_manifest, stage

EXPERIMENTS = "experiments"  # folder in a run folder
_FETCH_S = 600.0  # for another process that copies the same run


def local_dataset(location: Path | str, stage_dir: Path | None = None, *, progress: Progress = silent) -> Path:
    """The folder of a graph store; one at a URI is copied to `stage_dir` first, unless it is there."""
    if not is_uri(location):
        return Path(location)
    return stage(str(location), local_copy(str(location), "datasets", stage_dir), progress=progress)


def local_run(location: Path | str, stage_dir: Path | None = None) -> tuple[Path, list[str] | None]:
    """The folder of a run that is to be read, and for a URI the names of its checkpoints, which are not copied.

    DataError where there is no run at the URI.
    """
    if not is_uri(location):
        return Path(location), None
    uri = str(location)
    folder = local_copy(uri, "read-runs", stage_dir)  # not "runs": a training of this host may be at work there
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with flocked(folder / ".fetch.lock", wait_s=_FETCH_S):
            checkpoints = fetch(uri, folder)
    except BlockingIOError as error:
        raise InUse(
            f"{folder} is being copied from {uri} by {error}, for more than {_FETCH_S:.0f} s; wait for it, or choose "
            "another --stage-dir"
        ) from None
    if not (folder / "config.yaml").is_file():
        raise DataError(f"{uri} has no config.yaml: there is no run; give the URI of a run folder")
    return folder, checkpoints


def experiment_place(run: Path | str, experiment: str | None) -> str:
    """Path or URI of the results of an experiment in a run folder; of the folder's own without a name."""
    return str(run) if experiment is None else f"{str(run).rstrip('/')}/{EXPERIMENTS}/{experiment}"


def experiments(location: Path | str) -> list[str]:
    """Names of the experiments in a run folder, at a path or URI."""
    if is_uri(location):
        remote = open_remote(str(location))
        found = remote.names(EXPERIMENTS)
        return sorted(name for name in found if remote.size(f"{EXPERIMENTS}/{name}/config.yaml") is not None)
    return sorted(path.parent.name for path in (Path(location) / EXPERIMENTS).glob("*/config.yaml"))


@contextmanager
def local_output(location: Path | str) -> Iterator[Path]:
    """A path to write one file to; for a URI it is uploaded when all went well."""
    require_writable(location)
    if not is_uri(location):
        yield Path(location)
        return
    uri = str(location)
    parent, _, name = uri.rpartition("/")
    open_remote(parent)  # a wrong URI is found before the work
    if name in ("", ".", ".."):
        raise ValueError(f"{uri} is a folder; write the URI of a file to make, like {parent}/out.parquet")
    with tempfile.TemporaryDirectory(prefix="penstock-out-") as folder:
        path = Path(folder) / name
        yield path
        publish_file(path, uri)


def require_writable(location: Path | str) -> None:
    """ValueError unless a file can be written at a path or URI; what is there stays as it is."""
    try:
        if is_uri(location):
            parent, _, name = str(location).rpartition("/")
            probe = f".{name}.{secrets.token_hex(6)}.probe"
            folder = open_remote(parent)
            folder.write(probe, b"")
            folder.delete(probe)
            return
        path = Path(location)
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the path of a file to make")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except (OSError, RemoteError, DataError) as error:
        raise ValueError(f"{location} cannot be written: {error}; choose another place") from error


def publish_file(path: Path, uri: str) -> None:
    """Copy a finished local file to a URI."""
    folder, _, name = uri.rpartition("/")
    open_remote(folder).upload(path, name)


def seal_dataset(location: Path | str, stage_dir: Path | None = None, *, progress: Progress = silent) -> None:
    """Give a graph store its checksums of blocks, where it has none; see `seal_graph`."""
    folder = local_dataset(location, stage_dir, progress=progress)
    seal_graph(folder, progress=progress)
    remote = open_remote(str(location)) if is_uri(location) else None
    data = (folder / MANIFEST).read_bytes()
    if remote is not None and remote.read_if_there(MANIFEST) != data:
        remote.upload(folder / FEATURE_SUMS, FEATURE_SUMS)
        remote.write(MANIFEST, data)


def upload_store(folder: Path, uri: str, *, progress: Progress = silent) -> None:
    """Copy a local graph store to a URI, its manifest last; ValueError where another store is there.

    A killed upload starts over: sizes alone do not tell whose files are there.
    """
    remote = open_remote(uri)
    data = (folder / MANIFEST).read_bytes()
    there = remote.read_if_there(MANIFEST)
    if there is not None and there != data:
        raise ValueError(f"{remote.uri} holds another store; choose another URI, or delete what is there")
    if there == data:
        return
    _, manifest = read_remote_manifest(open_remote(folder.absolute().as_uri()))
    total, done = sum(entry.bytes for entry in manifest.files), 0
    for entry in manifest.files:
        progress("upload", done, total, "bytes")
        remote.upload(folder / entry.name, entry.name)
        done += entry.bytes
    remote.write(MANIFEST, data)
    progress("upload", done, total, "bytes")
