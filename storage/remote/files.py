"""Files of one remote folder, on any file system that fsspec knows, with bounded waits and retries.

Every call runs in a thread of its own, because libraries below may wait without an end: after its deadline it is
given up. Calls that fail are tried again after 0.2, 0.4, 0.8, ... s, except where trying again cannot help.

A call that was given up may still land. So of all that write a file in this process, tries of one call run beside each
other, which write the same, and nothing else: the next call waits until those that were given up have ended.
"""

import inspect
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from penstock.storage.errors import DataError, DoesNotFit, MissingDependency, TryAgain, full_disk_is_clear
from penstock.storage.extras import install_command
from penstock.storage.manifest import fsync_folder
from penstock.storage.redaction import redact_text
from penstock.storage.remote.conditional import Changed, ConditionalWrites
from penstock.storage.remote.uris import check_uri

logger = logging.getLogger(__name__)

TRIES = 5
TIMEOUT_S = 60.0
_SLOWEST = 1 << 20  # bytes/s; a transfer that is slower than this for its whole length counts as hung
_FIRST_PAUSE_S = 0.2
_COPY_BYTES = 8 << 20
_EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "azure"),
}
_EXCLUSIVE = ("s3", "s3a", "gs", "gcs")  # from the versions on that know `mode`; others look first, and write then
_WRITING = ("write", "create", "upload")  # these find nothing where the bucket is missing
_CHANGING = (*_WRITING, "delete")
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, DoesNotFit, ImportError)
_Found = TypeVar("_Found")


class RemoteError(TryAgain, OSError):
    """A remote file system did not do what was asked, in as many tries as it was given."""


@dataclass(frozen=True, slots=True)
class _Late:
    """A write that was given up and may still land, of a try of `call`."""

    uri: str
    call: object
    thread: threading.Thread

    def touches(self, uri: str) -> bool:
        """Whether it may change what is at a URI, or below."""
        return uri == self.uri or f"{uri}/".startswith(f"{self.uri}/") or f"{self.uri}/".startswith(f"{uri}/")


class _LateWrites:
    """Those of this process, whichever folder object made them; used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: list[_Late] = []

    def add(self, late: _Late) -> None:
        with self._lock:
            self._found = [each for each in self._found if each.thread.is_alive()] + [late]

    def wait(self, uri: str, call: object, timeout_s: float) -> None:
        """Wait for what other calls write there; TimeoutError where that takes too long."""
        with self._lock:
            found = [each.thread for each in self._found if each.call is not call and each.touches(uri)]
        ends = time.monotonic() + timeout_s
        for thread in found:
            thread.join(max(0.0, ends - time.monotonic()))
            if thread.is_alive():
                raise TimeoutError(f"an earlier write, which was given up, has not ended within {timeout_s:.0f} s")


_late_writes = _LateWrites()


def _in_time(call: Callable[[], _Found], timeout_s: float, give_up: Callable[[threading.Thread], object]) -> _Found:
    """Run `call` in a daemon thread; TimeoutError where it takes longer: the thread goes on, and `give_up` gets it."""
    found: list[_Found] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:  # a process boundary of a kind: raised again below
            failed.append(error)

    thread = threading.Thread(target=work, name="penstock-remote", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failed:
        raise failed[0]
    if not found:
        give_up(thread)
        raise TimeoutError(f"no answer within {timeout_s:.0f} s")
    return found[0]


class RemoteFolder:
    """A folder at a URI; names are relative to it. Made by `open_remote`; safe for use by many threads."""

    def __init__(self, uri: str, files: Any, root: str, *, tries: int, timeout_s: float) -> None:
        self.uri, self._files, self._root = uri, files, root.rstrip("/")
        self._tries, self._timeout_s = tries, timeout_s
        self._is_local = isinstance(files, LocalFileSystem)
        is_s3 = uri.partition("://")[0] in ("s3", "s3a") and _knows_exclusive(uri, files)
        self._conditional = ConditionalWrites(files) if is_s3 else None
        self._creates_exclusively = self._is_local or _knows_exclusive(self.uri, files)

    @property
    def creates_atomically(self) -> bool:
        """Whether of several that `create` a file at once only one succeeds, as far as is known: `create` finds out
        where a server does not keep what its protocol promises."""
        return self._creates_exclusively

    def uri_of(self, name: str) -> str:
        """The URI of a file."""
        return f"{self.uri}/{name}" if name else self.uri

    def read(self, name: str, lo: int | None = None, hi: int | None = None) -> bytes:
        """Read bytes lo..hi-1, or all; FileNotFoundError where the file is missing."""
        size = (hi or 0) - (lo or 0)
        found = self._call("read", name, lambda path: self._files.cat_file(path, start=lo, end=hi), size)
        return bytes(found)

    def download(self, name: str, target: Path) -> None:
        """Copy a file to local disk in pieces, under its name when complete; FileNotFoundError where it is missing."""
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(self.uri_of(name))
        target.parent.mkdir(parents=True, exist_ok=True)

        def fill(file: Any) -> None:
            for lo in range(0, size, _COPY_BYTES):
                file.write(self.read(name, lo, min(size, lo + _COPY_BYTES)))

        _replace_local(target, fill)

    def read_if_there(self, name: str) -> bytes | None:
        """Read a small file, None where it is missing."""
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """Bytes of a file as they are now, None where it is missing."""

        def ask(path: str) -> int:
            self._files.invalidate_cache()
            return int(self._files.info(path)["size"])

        try:
            return self._call("look at", name, ask)
        except FileNotFoundError:
            return None

    def names(self, name: str = "") -> list[str]:
        """Names of files and folders directly in a folder, sorted; none where it is missing."""

        def ask(path: str) -> list[str]:
            self._files.invalidate_cache()
            found = {str(entry).rstrip("/") for entry in self._files.ls(path, detail=False)}
            inside = {entry for entry in found if entry.rstrip("/") != path.rstrip("/")}  # some list the folder itself
            return sorted(entry.rsplit("/", 1)[-1] for entry in inside)

        try:
            return self._call("list", name, ask)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file: a reader finds the old or the new one, as far as the file system can do that."""
        if self._is_local:
            self._call("write", name, lambda path: _replace_local(Path(path), lambda file: file.write(data)), len(data))
        elif self._conditional is None:
            self._call("write", name, lambda path: self._files.pipe_file(path, data), len(data))
        else:
            writes = self._conditional
            expected = self._call("look at", name, writes.expect)  # once: every try replaces the same
            try:
                self._call("write", name, lambda path: writes.write(path, data, expected), len(data))
            except RemoteError as error:
                if isinstance(error.__cause__, Changed):
                    writes.forget(f"{self._root}/{name}")
                raise

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one; False where there is. Atomic where the file system can do that.

        `data` has to be this caller's alone: a file that has it was created here, by a try whose answer was lost.
        """

        def make(path: str) -> None:
            if self._is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                with open(path, "xb") as file:
                    file.write(data)
                return
            try:
                self._files.pipe_file(path, data, mode="create")
            except (NotImplementedError, TypeError):  # callers read it again to see who was last
                self._creates_exclusively = False
                self._files.pipe_file(path, data)

        try:
            self._call("create", name, make, len(data))
        except FileExistsError:
            return self.read_if_there(name) == data
        if self._creates_exclusively and not self._is_local:
            self._prove_exclusive(name, data)
        return True

    def _prove_exclusive(self, name: str, data: bytes) -> None:
        """Create a file of ours once more: a server that lets us knows no conditions, whatever its protocol says."""
        try:
            self._call("create", name, lambda path: self._files.pipe_file(path, data, mode="create"), len(data))
        except FileExistsError:
            return
        self._creates_exclusively = False
        logger.warning("%s lets two create one file; locks there are settled by waiting", self.uri)

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file there and check its size; FileNotFoundError where the local file goes meanwhile."""
        before = source.stat()
        size = before.st_size
        gone = FileNotFoundError(f"{source} has gone or was replaced while it was copied")

        def put(path: str) -> bool:
            try:
                if self._is_local:
                    with open(source, "rb") as given:
                        _replace_local(Path(path), lambda file: _copy(given, file))
                else:
                    self._files.put_file(str(source), path)
                return True
            except FileNotFoundError:
                if _is_still(source, before):
                    raise  # so it is the other side
                return False

        if not self._call("upload", name, put, size):
            raise gone
        if (there := self.size(name)) != size:
            if not _is_still(source, before):
                raise gone
            raise RemoteError(f"{self.uri_of(name)} has {there} bytes after the upload of {size} from {source}")

    def delete(self, name: str) -> None:
        """Delete a file or a folder with all that is in it, if it is there."""

        def remove(path: str) -> None:
            if self._conditional is not None:
                self._conditional.forget(path)
            self._files.invalidate_cache()
            self._files.rm(path, recursive=True)

        try:
            self._call("delete", name, remove)
        except FileNotFoundError:
            pass

    def _call(self, verb: str, name: str, call: Callable[[str], _Found], num_bytes: int = 0) -> _Found:
        path = f"{self._root}/{name}" if name else self._root
        began, pause_s, this = time.monotonic(), _FIRST_PAUSE_S, object()
        timeout_s = self._timeout_s + max(0, num_bytes) / _SLOWEST

        def give_up(thread: threading.Thread) -> None:
            if verb in _CHANGING:
                _late_writes.add(_Late(self.uri_of(name), this, thread))

        for attempt in range(1, self._tries + 1):
            try:
                if verb in _CHANGING:
                    _late_writes.wait(self.uri_of(name), this, timeout_s)
                return _in_time(lambda: call(path), timeout_s, give_up)
            except Changed as error:
                raise RemoteError(
                    f"{self.uri_of(name)} was written by somebody else meanwhile and is left so; see who else is there"
                ) from error
            except FileNotFoundError as error:
                if verb not in _WRITING:
                    raise
                raise DataError(
                    f"cannot {verb} {self.uri_of(name)}: {redact_text(str(error))}; make it first"
                ) from error
            except _FINAL:
                raise
            except PermissionError as error:
                raise DataError(
                    f"{self.uri_of(name)}: access is refused ({redact_text(str(error))}); check the credentials in the "
                    "environment, or the machine's role"
                ) from error
            except Exception as error:  # of libraries, each with its own types
                if attempt == self._tries:
                    raise RemoteError(
                        f"cannot {verb} {self.uri_of(name)}: {attempt} tries in {time.monotonic() - began:.0f} s "
                        f"failed, the last with {type(error).__name__}: {redact_text(str(error))}"
                    ) from error
                logger.info("%s %s failed, trying again: %s", verb, self.uri_of(name), redact_text(str(error)))
                time.sleep(pause_s)
                pause_s *= 2
        raise AssertionError("there is at least one try")


def _knows_exclusive(uri: str, files: Any) -> bool:
    """Whether the library that is installed creates files exclusively: s3fs before 2024.12 drops the wish unsaid."""
    write = getattr(files, "_pipe_file", None)
    return uri.partition("://")[0] in _EXCLUSIVE and write is not None and "mode" in inspect.signature(write).parameters


def _is_still(path: Path, before: os.stat_result) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return False
    return (now.st_ino, now.st_size, now.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)


def _copy(source: Any, target: Any) -> None:
    while chunk := source.read(_COPY_BYTES):
        target.write(chunk)


def _replace_local(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file of a mounted file system as we write our own: complete and synced before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")  # other hosts may write here too
    with full_disk_is_clear(path):
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_folder(path.parent)


def open_remote(uri: str, *, tries: int = TRIES, timeout_s: float = TIMEOUT_S) -> RemoteFolder:
    """Open the folder at a URI; nothing is read yet.

    ValueError where the URI holds credentials or its protocol is unknown; MissingDependency names the command
    that brings the protocol's library.
    """
    uri = check_uri(uri)
    protocol = uri.partition("://")[0]
    try:
        # No caches: others write there too.
        files, root = fsspec.url_to_fs(uri, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        remedy = install_command(extra) if extra else f"install the library for {protocol}"
        raise MissingDependency(f"{uri} needs a library that is not installed ({error}); {remedy}") from error
    except ValueError as error:
        raise ValueError(
            f"{uri}: {redact_text(str(error))}; use a protocol that fsspec knows, like s3, gs, az or file"
        ) from error
    return RemoteFolder(uri, files, str(root), tries=tries, timeout_s=timeout_s)
