"""Copy a graph store from a URI to local disk: checked, resumable, once per host.

Beside the payload file `x.npy` on its way lie `.x.npy.part`, its pieces, and `.x.npy.pieces`, a line `index xxh3` for
each piece that is there: a copy that was killed goes on with the pieces whose checksums hold. A file gets its name when
the whole has the checksum of the manifest, and the manifest comes last. Of the processes of a host one copies, under
`.<folder>.lock` beside the folder; the others wait and find it done. Who reads a copy holds `.<folder>.readers`.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from penstock.storage.errors import DataError, DoesNotFit, FormatError, InUse, full_disk_is_clear
from penstock.storage.graph import FORMAT, VERSIONS
from penstock.storage.manifest import (
    MANIFEST,
    FileEntry,
    Manifest,
    fsync_folder,
    parse_manifest,
    write_atomic,
)
from penstock.storage.progress import Progress, silent
from penstock.storage.remote.files import RemoteFolder, open_remote
from penstock.storage.remote.hostlock import flocked

logger = logging.getLogger(__name__)

PIECE_BYTES = 8 << 20
IDLE_S = 600.0  # how long another process may hold the lock without finishing a piece
_SPARE_BYTES = 1 << 20
_SAY_EVERY_S = 30.0


def read_remote_manifest(remote: RemoteFolder) -> tuple[bytes, Manifest]:
    """Read and check the manifest of a store at a URI; DataError where there is none, FormatError where it is bad."""
    where = remote.uri_of(MANIFEST)
    data = remote.read_if_there(MANIFEST)
    if data is None:
        raise DataError(f"{where} does not exist: there is no complete graph store at {remote.uri}")
    try:
        value = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where} is no JSON ({error}); upload the store again") from error
    manifest = parse_manifest(value, where, FORMAT, VERSIONS)
    names = [entry.name for entry in manifest.files]
    for entry in manifest.files:
        hidden = not entry.name or entry.name == MANIFEST or any(part[:1] == "." for part in entry.name.split("/"))
        if hidden or names.count(entry.name) > 1:
            raise FormatError(f"{where}: {entry.name!r} is no name that a payload file can have")
        if type(entry.bytes) is not int or entry.bytes < 0 or not isinstance(entry.xxh3, str):
            raise FormatError(f"{where}: size or checksum of {entry.name!r} is malformed; upload the store again")
    return data, manifest


@dataclass(slots=True)
class _Part:
    """A payload file on its way. Its pieces are written by many threads, each to its own place."""

    entry: FileEntry
    path: Path
    missing: list[int] = field(default_factory=list)

    @property
    def temporary(self) -> Path:
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def journal(self) -> Path:
        return self.path.with_name(f".{self.path.name}.pieces")

    @property
    def num_pieces(self) -> int:
        return -(-self.entry.bytes // PIECE_BYTES)

    def bounds(self, piece: int) -> tuple[int, int]:
        return piece * PIECE_BYTES, min(self.entry.bytes, (piece + 1) * PIECE_BYTES)

    def begin(self, tick: Callable[[], None]) -> None:
        """Find out which pieces are there; whatever belongs to another file of this name is dropped."""
        header = f"{self.entry.xxh3} {self.entry.bytes} {PIECE_BYTES}"
        lines = self.journal.read_text(errors="replace").split("\n")[:-1] if self.journal.is_file() else []
        there: set[int] = set()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if lines[:1] == [header] and self.temporary.is_file():
            with open(self.temporary, "rb") as file:
                for line in lines[1:]:
                    index, _, wanted = line.partition(" ")
                    if index.isdecimal() and int(index) < self.num_pieces:
                        lo, hi = self.bounds(int(index))
                        tick()
                        file.seek(lo)
                        if xxhash.xxh3_64_hexdigest(file.read(hi - lo)) == wanted:
                            there.add(int(index))
        else:
            self.discard()
            self.journal.write_text(header + "\n")
            self.temporary.touch()
        self.missing = [piece for piece in range(self.num_pieces) if piece not in there]

    def discard(self) -> None:
        """Drop all pieces."""
        self.journal.unlink(missing_ok=True)  # first: it must not name pieces that are gone
        self.temporary.unlink(missing_ok=True)

    def fetch(self, remote: RemoteFolder, piece: int) -> int:
        """Copy one piece; FormatError where the remote file ends before it."""
        lo, hi = self.bounds(piece)
        data = remote.read(self.entry.name, lo, hi)
        if len(data) != hi - lo:
            raise FormatError(
                f"{remote.uri_of(self.entry.name)} gave {len(data)} bytes from {lo}, wanted {hi - lo}: it is truncated "
                "or was replaced; upload the store again"
            )
        with full_disk_is_clear(self.path):
            with open(self.temporary, "r+b") as file:
                file.seek(lo)
                file.write(data)
            line = f"{piece} {xxhash.xxh3_64_hexdigest(data)}\n".encode()
            fd = os.open(self.journal, os.O_WRONLY | os.O_APPEND)
            try:
                os.write(fd, line)  # one call: lines of other threads do not mix with it
            finally:
                os.close(fd)
        return hi - lo

    def finish(self, tick: Callable[[], None]) -> bool:
        """Give the file its name if the whole has the right checksum; else drop it."""
        if _checksum(self.temporary, tick) != self.entry.xxh3:
            self.discard()
            return False
        fd = os.open(self.temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(self.temporary, self.path)
        self.journal.unlink(missing_ok=True)
        return True


def _checksum(path: Path, tick: Callable[[], None]) -> str:
    """`checksum_file` that shows that it is at work: large files take minutes."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(PIECE_BYTES):
            digest.update(chunk)
            tick()
    return str(digest.hexdigest())


def _is_complete(folder: Path, data: bytes, manifest: Manifest) -> bool:
    """Whether the folder is a copy of the store with these bytes as its manifest; sizes are compared."""
    path = folder / MANIFEST
    if not path.is_file() or path.read_bytes() != data:
        return False
    return all((folder / e.name).is_file() and (folder / e.name).stat().st_size == e.bytes for e in manifest.files)


def _require_disk(folder: Path, parts: list[_Part]) -> None:
    needed = sum(hi - lo for part in parts for lo, hi in map(part.bounds, part.missing)) + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFit(
            f"{folder} needs {needed} bytes for what is still to be copied, its disk has {free} free; free space there "
            "or choose another --stage-dir",
            disk_bytes=needed,
        )


class _Copy:
    """One copying of a store, under the lock of its folder."""

    def __init__(self, remote: RemoteFolder, folder: Path, data: bytes, manifest: Manifest, lock: Path) -> None:
        self._remote, self._folder, self._data, self._manifest = remote, folder, data, manifest
        self._lock = lock

    def _tick(self) -> None:
        """Tell those who wait for the lock that its holder is at work."""
        os.utime(self._lock)

    def run(self, progress: Progress, threads: int) -> None:
        """Fetch what is missing, then publish; resumable wherever it is cut."""
        parts = self._parts()
        self._fetch(parts, progress, threads)
        damaged = [part for part in parts if not part.finish(self._tick)]
        if damaged:
            self._require_unchanged()
            logger.warning("%s: wrong checksum after the copy, copying it again", damaged[0].path)
            for part in damaged:
                part.begin(self._tick)
            self._fetch(damaged, progress, threads)
            for part in damaged:
                if not part.finish(self._tick):
                    raise FormatError(
                        f"{self._remote.uri_of(part.entry.name)} does not have the checksum {part.entry.xxh3} of its "
                        "manifest, twice; it is damaged there: upload the store again"
                    )
        self._require_unchanged()
        for folder in {self._folder, *(part.path.parent for part in parts)}:
            fsync_folder(folder)
        write_atomic(self._folder / MANIFEST, self._data)

    def _parts(self) -> list[_Part]:
        """Files to copy; those of another version are dropped, those that are there and right are kept."""
        there = self._folder / MANIFEST
        there.unlink(missing_ok=True)  # first: what follows may be cut, and must not look complete
        fsync_folder(self._folder)
        wanted = {entry.name for entry in self._manifest.files}
        for path in self._folder.rglob("*"):
            name = str(path.relative_to(self._folder))
            of = path.name.removeprefix(".").removesuffix(".part").removesuffix(".pieces")
            kept = name in wanted or (path.name.startswith(".") and str(Path(name).with_name(of)) in wanted)
            if path.is_file() and not kept:
                path.unlink()
        parts = []
        for entry in self._manifest.files:
            path = self._folder / entry.name
            self._require_size(entry)
            if path.is_file() and path.stat().st_size == entry.bytes and _checksum(path, self._tick) == entry.xxh3:
                continue
            path.unlink(missing_ok=True)
            part = _Part(entry, path)
            part.begin(self._tick)
            parts.append(part)
        _require_disk(self._folder, parts)
        return parts

    def _require_size(self, entry: FileEntry) -> None:
        size = self._remote.size(entry.name)
        if size != entry.bytes:
            self._require_unchanged()
            found = "is missing" if size is None else f"has {size} bytes, its manifest says {entry.bytes}"
            raise FormatError(f"{self._remote.uri_of(entry.name)} {found}; upload the store again")

    def _require_unchanged(self) -> None:
        if self._remote.read_if_there(MANIFEST) != self._data:
            raise DataError(f"{self._remote.uri} was replaced while it was being copied; run the same command again")

    def _fetch(self, parts: list[_Part], progress: Progress, threads: int) -> None:
        total = sum(entry.bytes for entry in self._manifest.files)
        done = total - sum(hi - lo for part in parts for lo, hi in map(part.bounds, part.missing))
        todo = iter([(part, piece) for part in parts for piece in part.missing])
        progress("stage", done, total, "bytes")
        with ThreadPoolExecutor(threads, thread_name_prefix="penstock-stage") as pool:
            running: set[Future[int]] = set()
            try:
                while True:
                    while len(running) < 2 * threads and (job := next(todo, None)) is not None:
                        running.add(pool.submit(job[0].fetch, self._remote, job[1]))
                    if not running:
                        return
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    done += sum(future.result() for future in ended)
                    self._tick()
                    progress("stage", done, total, "bytes")
            except FileNotFoundError as error:
                self._require_unchanged()
                raise FormatError(f"{self._remote.uri}: a file has gone ({error}); upload the store again") from error
            except FormatError:
                self._require_unchanged()
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _patience(uri: str, progress: Progress) -> Callable[[str], None]:
    """Say now and then whom we wait for, and let the user end the wait."""
    said = -_SAY_EVERY_S

    def waiting(holder: str) -> None:
        nonlocal said
        progress("stage", 0, 1, "copies")
        if time.monotonic() - said >= _SAY_EVERY_S:
            said = time.monotonic()
            logger.warning("%s is being copied by %s; waiting for it", uri, holder)

    return waiting


def stage(
    uri: str, folder: Path, *, progress: Progress = silent, threads: int = 4, remote: RemoteFolder | None = None
) -> Path:
    """Copy the graph store at `uri` to `folder` and return it; what is there already is not copied again.

    Memory: 16 MiB per thread. DoesNotFit before anything is copied where the disk is too small; DataError where the
    store is missing, damaged or replaced meanwhile; InUse where another process is stuck in copying it, or still
    reads another version of it here.
    """
    remote = remote or open_remote(uri)
    data, manifest = read_remote_manifest(remote)
    if _is_complete(folder, data, manifest):
        return folder
    lock = _beside(folder, "lock")
    try:
        with flocked(lock, wait_s=IDLE_S, waiting=_patience(remote.uri, progress)):
            data, manifest = read_remote_manifest(remote)
            if _is_complete(folder, data, manifest):
                return folder
            folder.mkdir(parents=True, exist_ok=True)
            with _without_readers(folder, remote.uri):
                _Copy(remote, folder, data, manifest, lock).run(progress, threads)
    except BlockingIOError as error:
        raise InUse(
            f"{folder} is being copied from {remote.uri} by {error}, which has finished no piece for {IDLE_S:.0f} s; "
            "stop that process, or choose another --stage-dir"
        ) from error
    return folder


@contextmanager
def _without_readers(folder: Path, uri: str) -> Iterator[None]:
    try:
        with flocked(_beside(folder, "readers")):
            yield
    except BlockingIOError:
        raise InUse(
            f"{uri} has changed, and another process on this host still reads the earlier version in {folder}; wait "
            "for it, or choose another --stage-dir"
        ) from None


@contextmanager
def staged(uri: str, folder: Path, *, progress: Progress = silent, threads: int = 4) -> Iterator[Path]:
    """`stage`, and keep other processes from replacing the copy by another version while it is read."""
    stage(uri, folder, progress=progress, threads=threads)
    with ExitStack() as stack:
        try:
            stack.enter_context(flocked(_beside(folder, "readers"), shared=True, wait_s=IDLE_S))
        except BlockingIOError as error:
            raise InUse(f"{folder} is being replaced by {error}; wait for it, or choose another --stage-dir") from None
        yield folder
