"""Keep a remote copy of the durable part of a run folder while it grows.

The copy looks like the folder, and is of use at every moment: payload of a checkpoint goes before its `state.json`, and
without that a remote checkpoint does not exist; `metrics.jsonl` goes before the checkpoints that count on it;
`result.json` goes last. A checkpoint that is written again at the same step goes to `step-000000012.1`, `.2`, ..., so
that the one it replaces stays until it is there. Packs, traces and scratch are not copied. See `pull` for the way back.
"""

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from penstock.storage.errors import DataError, DoesNotFit
from penstock.storage.remote.files import RemoteFolder, open_remote
from penstock.storage.remote.lock import Lock, LockLost

logger = logging.getLogger(__name__)

CHECKPOINTS, STATE, RESULT, METRICS, MODEL = "checkpoints", "state.json", "result.json", "metrics.jsonl", "model"
FIRST_FILES = ("config.yaml", "machine.json", "chunked.json", METRICS)  # checkpoints count on these
LAST_FILES = ("plan.json", "curves.png", "schedule.png", "timeline.json", "report.html")
INTERVAL_S = 15.0
_LONGEST_PAUSE_S = 300.0
_TICK_S = 1.0
_LOCAL_NAME = re.compile(r"step-(\d{9,})")
_REMOTE_NAME = re.compile(r"step-(\d{9,})(?:\.(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RemoteCheckpoint:
    """A folder of a checkpoint in the remote copy; `generation` counts those of the same step."""

    step: int
    generation: int
    name: str


def list_remote_checkpoints(remote: RemoteFolder) -> list[RemoteCheckpoint]:
    """Folders of checkpoints, the newest first, complete or not."""
    found = [(name, _REMOTE_NAME.fullmatch(name)) for name in remote.names(CHECKPOINTS)]
    return sorted(
        (RemoteCheckpoint(step=int(m[1]), generation=int(m[2] or 0), name=name) for name, m in found if m),
        reverse=True,
    )


def local_checkpoints(folder: Path) -> dict[int, Path]:
    """Folders of local checkpoints by step, the newest first; those on their way have other names."""
    found = {
        int(m[1]): path for path in (folder / CHECKPOINTS).glob("step-*") if (m := _LOCAL_NAME.fullmatch(path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def _whole_lines(name: str, data: bytes) -> bytes:
    """Of a file that is being appended to, what is finished."""
    return data[: data.rfind(b"\n") + 1] if name.endswith(".jsonl") else data


def _reads(path: Path, data: bytes) -> bool:
    try:
        return path.read_bytes() == data
    except FileNotFoundError:
        return False


class Mirror:
    """Copies a run folder to its URI; made by `open_mirror`. `sync` may be called by any thread."""

    def __init__(self, folder: Path, remote: RemoteFolder, lock: Lock | None, interval_s: float) -> None:
        self._interval_s = interval_s
        self.folder, self._remote, self._lock = folder, remote, lock
        self._sent: dict[str, tuple[int, int, int]] = {}  # what the remote copies of small files were made from
        self._states: dict[str, bytes] | None = None  # state.json of remote checkpoints; unknown before the first pass
        self._newest: int | None = None  # step of the newest checkpoint that the last pass saw
        self._gone: set[str] = set()  # remote checkpoints that the last pass found to have no local one
        self._passing = threading.Lock()
        self._closing = threading.Event()

    def sync(self) -> None:
        """Copy what is new, and wait until it is there.

        RemoteError or DataError where the remote side fails, LockLost where another process has taken the folder.
        """
        with self._passing:
            self._require_lock()
            self._pass()

    def keep(self) -> None:
        """Copy every now and then, and every new checkpoint within a second or so, until closed; runs in a thread.

        A failure is logged once and tried again later.
        """
        said, pause_s, failing = "", min(_TICK_S, self._interval_s), False
        while self._wait(pause_s, for_checkpoint=not failing):
            try:
                self.sync()
                said, pause_s, failing = "", self._interval_s, False
            except LockLost:
                return  # the lock says so, and `sync` raises it to the run
            except (OSError, DataError, DoesNotFit) as error:
                pause_s, failing = min(2 * pause_s, _LONGEST_PAUSE_S), True
                cause = f"{type(error).__name__} {error.__cause__ or error}"
                if cause != said:
                    logger.warning("%s is not up to date, trying again: %s", self._remote.uri, error)
                said = cause

    def _wait(self, pause_s: float, *, for_checkpoint: bool) -> bool:
        """Wait for the time or for a new checkpoint; False once closed."""
        deadline = time.monotonic() + pause_s
        while (left := deadline - time.monotonic()) > 0:
            if self._closing.wait(min(left, _TICK_S)):
                return False
            if for_checkpoint and next(iter(local_checkpoints(self.folder)), None) != self._newest:
                break
        return not self._closing.is_set()

    def close(self) -> None:
        """Let the thread end after the file that it is at."""
        self._closing.set()

    def _require_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _pass(self) -> None:
        if self._states is None:
            self._states = self._read_states()
        checkpoints = local_checkpoints(self.folder)  # before metrics.jsonl, whose lines they count on
        self._newest = next(iter(checkpoints), None)
        for name in FIRST_FILES:
            self._send(name)
        newest_is_there = False
        for number, (step, path) in enumerate(checkpoints.items()):
            there = self._send_checkpoint(step, path)
            newest_is_there |= there and number == 0
        if newest_is_there:
            self._delete_gone(checkpoints)
        files = sorted(path for path in (self.folder / MODEL).glob("*") if path.name[0] != ".")
        for path in sorted(files, key=lambda path: path.name == "model.json"):  # it names the other's checksum
            self._send(f"{MODEL}/{path.name}")
        for name in LAST_FILES:
            self._send(name)
        self._send(RESULT)

    def _read_states(self) -> dict[str, bytes]:
        found = {}
        for checkpoint in list_remote_checkpoints(self._remote):
            data = self._remote.read_if_there(f"{CHECKPOINTS}/{checkpoint.name}/{STATE}")
            found[checkpoint.name] = data or b""
        return found

    def _send(self, name: str) -> None:
        """Copy one file outside of checkpoints if it changed; it is small, or does not change any more."""
        path = self.folder / name
        try:
            stat = path.stat()
            mark = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if self._sent.get(name) == mark:
                return
            if name.startswith(f"{MODEL}/"):
                self._remote.upload(path, name)
            else:
                if name == RESULT:
                    self._require_lock()
                self._remote.write(name, _whole_lines(name, path.read_bytes()))
        except FileNotFoundError:  # here: it has vanished, or is being replaced
            return
        self._sent[name] = mark

    def _send_checkpoint(self, step: int, path: Path) -> bool:
        """Copy a checkpoint unless it is there; whether it is there now. It may vanish or be replaced meanwhile."""
        assert self._states is not None
        try:
            state = (path / STATE).read_bytes()
        except FileNotFoundError:
            return False
        if state in self._states.values():
            return True
        name = self._name_for(step)
        self._states[name] = b""
        try:
            for file in sorted(path.iterdir()):
                if file.name != STATE:
                    self._remote.upload(file, f"{CHECKPOINTS}/{name}/{file.name}")
        except FileNotFoundError:
            return False
        if not _reads(path / STATE, state):
            return False  # replaced or deleted while it was copied; the next pass copies what is there then
        self._send(METRICS)
        self._require_lock()
        self._remote.write(f"{CHECKPOINTS}/{name}/{STATE}", state)
        self._states[name] = state
        return True

    def _name_for(self, step: int) -> str:
        """A remote folder that holds no complete checkpoint: one that was begun, or a new one."""
        assert self._states is not None
        known = {name: m for name in self._states if (m := _REMOTE_NAME.fullmatch(name)) and int(m[1]) == step}
        for name in known:
            if not self._states[name]:
                return name
        generation = max((int(m[2] or 0) + 1 for m in known.values()), default=0)
        return f"step-{step:09d}.{generation}" if generation else f"step-{step:09d}"

    def _delete_gone(self, checkpoints: dict[int, Path]) -> None:
        """Delete remote checkpoints that have no local one, now and in the pass before.

        While a checkpoint is being replaced it has no name for a moment; that must not cost its remote copy.
        """
        assert self._states is not None
        there: set[bytes] = set()
        for path in checkpoints.values():
            try:
                there.add((path / STATE).read_bytes())
            except FileNotFoundError:
                return  # things are moving; the next pass sees
        gone = {name for name, state in self._states.items() if state not in there}
        for name in sorted(gone & self._gone):
            self._require_lock()
            # first, so that a deletion that is cut leaves an incomplete checkpoint
            self._remote.delete(f"{CHECKPOINTS}/{name}/{STATE}")
            self._remote.delete(f"{CHECKPOINTS}/{name}")
            del self._states[name]
        self._gone = gone & set(self._states)


def forget(uri: str, *, remote: RemoteFolder | None = None) -> None:
    """Delete the remote copy of a run, its result first; the lock stays."""
    remote = remote or open_remote(uri)
    remote.delete(RESULT)
    for checkpoint in list_remote_checkpoints(remote):
        remote.delete(f"{CHECKPOINTS}/{checkpoint.name}/{STATE}")
    for name in (MODEL, CHECKPOINTS, *LAST_FILES, *FIRST_FILES[::-1]):
        remote.delete(name)


@contextmanager
def open_mirror(
    folder: Path,
    uri: str,
    *,
    lock: Lock | None = None,
    interval_s: float = INTERVAL_S,
    promises: tuple[type[Exception], ...] = (),
    remote: RemoteFolder | None = None,
) -> Iterator[Mirror]:
    """Copy what the run folder holds to `uri` while open, and at the end, also where the run fails.

    A last copy that fails is raised, unless the run failed with something else: that is raised then, and the copy only
    logged. Errors of the types `promises` say that all is saved, so there too the copy's failure is raised.
    """
    mirror = Mirror(folder, remote or open_remote(uri), lock, interval_s)
    thread = threading.Thread(target=mirror.keep, name="penstock-mirror", daemon=True)
    thread.start()
    try:
        try:
            yield mirror
        except Exception as error:
            mirror.close()
            _sync_after(mirror, error, promises)
            raise
        mirror.close()
        mirror.sync()
    finally:
        mirror.close()


def _sync_after(mirror: Mirror, error: Exception, promises: tuple[type[Exception], ...]) -> None:
    try:
        mirror.sync()
    except LockLost as lost:
        raise lost from error
    except (OSError, DataError, DoesNotFit) as second:
        if isinstance(error, promises):
            raise second from error
        logger.error("the remote copy of the run is not up to date: %s", second)
