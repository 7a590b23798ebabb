"""One feeder as a puller uses it: a thread and a connection, from the first question to the fault that ends it."""

import json
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Protocol

import xxhash

from penstock.sampler.windowtask import WindowJob
from penstock.storage.errors import DoesNotFit, FormatError, full_disk_is_clear
from penstock.storage.manifest import open_seal
from penstock.storage.pack import PackIndex, PackSetMeta, parse_pack_index
from penstock.storage.trace import window_name
from penstock.storage.transfer import Address, Client, Damaged, Refused, connect

_WAIT_S = 0.5  # a feeder answers `wait` at the latest then
_IDLE_S = 0.1
_JOIN_S = 30.0
_TRIES = 3  # for a window that arrives damaged
_MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """What is too slow: an answer after `answer_s`; a window after `slow_s` and `slow_factor` times the median of all,
    where another feeder is there; and nothing at all from anybody for `timeout_s`.
    """

    answer_s: float = 20.0
    slow_s: float = 20.0
    slow_factor: float = 10.0
    timeout_s: float = 300.0


class Desk(Protocol):
    """What a lane asks of its puller; see `pulling.Puller`."""

    job: WindowJob
    packs: Path
    token: bytes
    pace: Pace

    def claim(self, lane: "Lane", held: Collection[int], depth: int) -> list[int]: ...
    def give_back(self, lane: "Lane", window: int, *, remake: bool) -> None: ...
    def admit(self, lane: "Lane", window: int, num_bytes: int) -> bool: ...
    def publish(self, lane: "Lane", window: int, index: bytes, pulled: Path, seconds: float) -> None: ...
    def abandon(self, window: int, pulled: Path) -> None: ...
    def failed(self, lane: "Lane", window: int, kind: str, message: str, num_inputs: int = 0) -> None: ...
    def fail(self, error: Exception) -> None: ...
    def lost(self, lane: "Lane", cause: str) -> None: ...
    def patience(self) -> float | None: ...
    def pause(self, seconds: float) -> None: ...


class PackSink:
    """Writes a pack as it comes and compares its extents with the index; Damaged comes with `finish`."""

    def __init__(self, file: IO[bytes], index: PackIndex) -> None:
        self._file, self._sizes, self._wanted = file, list(index.bytes), index.xxh3
        self._item, self._left = 0, self._sizes[0]
        self._digest = xxhash.xxh3_64()
        self._bad: list[int] = []

    def write(self, data: memoryview, /) -> None:
        """See `transfer.Sink`."""
        self._file.write(data)
        while len(data):
            piece = data[: self._left]
            self._digest.update(piece)
            self._left -= len(piece)
            data = data[len(piece) :]
            if self._left == 0:
                self._end_extent()

    def _end_extent(self) -> None:
        if self._digest.hexdigest() != self._wanted[self._item]:
            self._bad.append(self._item)
        self._item += 1
        self._left = self._sizes[self._item] if self._item < len(self._sizes) else 1 << 62
        self._digest = xxhash.xxh3_64()

    def finish(self) -> None:
        """Damaged unless every extent came and is what the index says."""
        if self._bad or self._item != len(self._sizes):
            bad = self._bad or [self._item]
            raise Damaged(f"extents {bad} of a window did not arrive as its index says; ask again")


class Lane:
    """A running lane; ends by itself, telling the puller why, or when it is stopped."""

    def __init__(self, desk: Desk, address: Address) -> None:
        self.address = address
        self._desk, self._stopped = desk, False
        self._client: Client | None = None
        self._asked: dict[int, float] = {}  # windows of this lane, and since when the feeder has them
        self._built: dict[int, float] = {}  # those that wait for room here, and how long they took
        self._thread = threading.Thread(target=self._run, name="penstock-lane", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End soon; may be called from any thread."""
        self._stopped = True
        if self._client is not None:
            self._client.close()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(_JOIN_S)

    def _run(self) -> None:
        desk = self._desk
        try:
            with connect(self.address, desk.token, timeout_s=desk.pace.answer_s) as self._client:
                kept = desk.job.kept.astype("<i8").tobytes()
                head, _ = self._client.ask({"op": "open", "job": desk.job.to_json()}, kept)
                while not self._stopped:
                    self._turn(self._client, depth=int(head["threads"]) + 1)
        except DoesNotFit as error:  # on this side
            desk.fail(error)
        except TimeoutError:
            desk.lost(self, f"it did not answer within {desk.pace.answer_s:.0f} s")
        except Exception as error:  # the thread's boundary: whatever it is, the feeder is of no use
            desk.lost(self, str(error) or repr(error))

    def _turn(self, client: Client, depth: int) -> None:
        """Ask for what is free, and take what is done."""
        has_room = True
        for window in self._desk.claim(self, self._asked, depth):
            try:
                if has_room:
                    has_room = client.ask({"op": "build", "window": window})[0]["state"] != "no room"
            except Refused as error:
                self._desk.failed(self, window, error.kind, str(error))
                continue
            if has_room:
                self._asked[window] = time.monotonic()
            else:
                self._desk.give_back(self, window, remake=False)
        if not self._asked:
            client.ask({"op": "status"})  # whether it is there
            self._desk.pause(_IDLE_S)
            return
        answer, _ = client.ask({"op": "wait", "windows": sorted(self._asked), "seconds": _WAIT_S})
        has_taken = [self._take(client, int(window), entry) for window, entry in sorted(answer["windows"].items())]
        if not any(has_taken):
            self._look_at_the_clock()
            if any(entry["state"] == "done" for entry in answer["windows"].values()):
                self._desk.pause(_IDLE_S)  # no room here yet

    def _look_at_the_clock(self) -> None:
        patience, now = self._desk.patience(), time.monotonic()
        for window, since in self._asked.items():
            if window not in self._built and patience is not None and now - since > patience:
                raise TooSlow(f"window {window} took longer than {patience:.0f} s, others are faster")

    def _take(self, client: Client, window: int, entry: dict[str, Any]) -> bool:
        """Pull a window that is done, and hand on the news of one that will not be."""
        if entry["state"] == "failed":
            del self._asked[window]
            client.ask({"op": "release", "window": window})
            self._desk.failed(self, window, entry["kind"], entry["error"], int(entry["num_inputs"]))
        elif entry["state"] == "unknown":
            del self._asked[window]
            self._built.pop(window, None)
            self._desk.give_back(self, window, remake=True)
        elif entry["state"] == "done":
            seconds = self._built.setdefault(window, time.monotonic() - self._asked[window])
            if not self._pull(client, window, int(entry["bytes"]), seconds):
                return False
            del self._asked[window], self._built[window]
            client.ask({"op": "release", "window": window})
        return entry["state"] not in ("queued", "building")

    def _pull(self, client: Client, window: int, num_bytes: int, seconds: float) -> bool:
        """Pull a window if there is room for it here."""
        desk, pulled = self._desk, self._desk.packs / (window_name(window, "pack") + ".pulled")
        if not desk.admit(self, window, num_bytes):
            return False
        try:
            for left in range(_TRIES - 1, -1, -1):
                try:
                    text = self._fetch(client, window, num_bytes, pulled)
                    break
                except Damaged:
                    if left == 0:
                        raise
            desk.publish(self, window, text, pulled, seconds)
        except BaseException:
            desk.abandon(window, pulled)
            raise
        return True

    def _fetch(self, client: Client, window: int, num_bytes: int, pulled: Path) -> bytes:
        question = {"op": "fetch", "window": window}
        _, text = client.ask(question | {"part": "index"}, limit=_MAX_INDEX_BYTES)
        try:
            value = json.loads(text)
        except ValueError as error:
            raise FormatError(f"the index of window {window} is malformed ({error})") from error
        if not isinstance(value, dict):
            raise FormatError(f"the index of window {window} is malformed: it is no object")
        index = parse_pack_index(open_seal(value, pulled, "it is asked for again"), pulled)
        check_index(index, self._desk.job.meta, window, num_bytes)
        with full_disk_is_clear(pulled), open(pulled, "wb", buffering=0) as file:
            sink = PackSink(file, index)
            client.ask_into(question | {"part": "pack"}, sink, limit=num_bytes, sink_checks=True)
        sink.finish()
        return text


def check_index(index: PackIndex, meta: PackSetMeta, window: int, num_bytes: int) -> None:
    """FormatError unless this is the index of a whole window of so many bytes: readers trust its numbers."""

    def is_size(value: Any) -> bool:
        return type(value) is int and value >= 0

    sizes, sums = index.bytes, index.xxh3
    small = (index.first_item, index.max_inputs, index.shared_bytes)
    wrong = (
        index.window != window
        or not all(map(is_size, small))
        or index.max_inputs > meta.max_inputs
        or index.shared_bytes > num_bytes
        or not (isinstance(sizes, tuple) and sizes and all(is_size(size) and size > 0 for size in sizes))
        or not (isinstance(sums, tuple) and len(sums) == len(sizes) and all(isinstance(xxh3, str) for xxh3 in sums))
        or index.offsets != tuple(accumulate(sizes[:-1], initial=0))
        or sum(sizes) != num_bytes
    )
    if wrong:
        raise FormatError(f"the index of window {window} is malformed, or of other bytes; pack it again")


class TooSlow(RuntimeError):
    """A feeder keeps the others waiting."""
