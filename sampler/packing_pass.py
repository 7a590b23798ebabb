"""One pass of the packer: scan the feature table once and write some windows.

The order of events makes it safe to be killed anywhere: files are reserved, item metadata and rows are appended, a
journal is written after their sync, shared segments are sorted, files are renamed, and each window's index comes last.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.parallel import parallel_for
from penstock.sampler.accesses import Accesses
from penstock.sampler.journal import STATE, Journal, StreamStates, delete_journal, write_journal
from penstock.sampler.part_reader import Part, PartReader
from penstock.sampler.pass_layout import GATHERERS, PassLayout, PassMemory, lay_out
from penstock.sampler.plan import Plan
from penstock.sampler.recording import PlanArrays
from penstock.sampler.row_source import RowSource, write_row_error
from penstock.sampler.segment_order import bucket_order, safe_copy, segment_sums, sort_buckets
from penstock.sampler.streams import StreamWriter
from penstock.storage.directio import PAGE, DirectFile
from penstock.storage.errors import DoesNotFit, FormatError
from penstock.storage.manifest import fsync_folder
from penstock.storage.npyfile import write_npy
from penstock.storage.pack import PackIndex, encode_extent_head, has_window, write_pack_index
from penstock.storage.progress import Progress
from penstock.storage.trace import window_name

CHECKPOINT_S = 10.0


class Stale(Exception):
    """What a killed pass left cannot be gone on with; the message says why. Nothing was written."""


class PackingPass:
    """Packs `windows` (counted from the plan's first) into the folder `out`; call `run` once."""

    def __init__(
        self,
        plan: Plan,
        accesses: Accesses,
        windows: Sequence[int],
        out: Path,
        memory: PassMemory,
        *,
        progress: Progress,
        checkpoint_s: float = CHECKPOINT_S,
    ) -> None:
        assert plan.arrays is not None
        self.plan, self.accesses, self.out, self.memory = plan, accesses, out, memory
        self.arrays: PlanArrays = plan.arrays
        self.layout: PassLayout = lay_out(plan, windows, memory.bucket_rows)
        self.journal = Journal(plan=plan.digest, windows=tuple(windows), bucket_rows=memory.bucket_rows)
        self._buckets = [n for n, region in enumerate(self.layout.regions) if region.item < 0]
        self._sorted = np.zeros(len(self.layout.regions), np.uint64)  # sums of sorted buckets
        self.errors = np.zeros((len(self.layout.regions), 2))  # of each stream, see `RowSource.copy`
        self._next_ids = np.zeros(len(self.layout.regions), np.int64)  # none of a stream's that are left is smaller
        self.sources = [RowSource(plan.stored, plan.meta.row_format, self._chunk_rows) for _ in range(GATHERERS)]
        self._progress, self._checkpoint_s = progress, checkpoint_s

    @property
    def _chunk_rows(self) -> int:
        return max(1, (self.memory.stage_bytes - PAGE) // self.plan.meta.row_format.row_bytes)

    def run(self, begun: tuple[Journal, StreamStates] | None = None) -> None:
        """Pack, or go on where a killed run `begun` was.

        DoesNotFit where the disk is full, Stale where it cannot go on, FormatError where the disk damaged what is read
        back; then the next pass begins anew.
        """
        try:
            self._run(begun)
        except FormatError:
            delete_journal(self.out)
            raise

    def _run(self, begun: tuple[Journal, StreamStates] | None) -> None:
        with ExitStack() as stack:
            files = self._open_files(stack, fresh=begun is None)
            reader = stack.enter_context(
                PartReader(self.plan.table, self.memory.part_rows, self.arrays.needed, self.memory.buffer_bytes)
            )
            writer = stack.enter_context(StreamWriter(self.layout.regions, files, self.memory.stage_bytes))
            if begun is not None:
                self._resume(writer, reader.buffers[0], *begun)
            else:
                self._write_prefixes(writer, reader.buffers[0])
            self._scan(reader, writer)
            writer.finish()
            if any(self.layout.shared_bytes.values()):
                self._sort_segments(files, writer, reader.buffers)
            if self.sources[0].lossy:
                write_row_error(self.out, self._window_errors())
            self._publish(files, writer, reader.buffers[0])

    def _path(self, window: int) -> Path:
        """The window's file: the finished name if a killed run got as far as renaming it."""
        final = self.out / window_name(self.plan.first_window + window, "pack")
        partial = final.with_name(final.name + ".partial")
        return final if final.exists() and not partial.exists() else partial

    def _open_files(self, stack: ExitStack, *, fresh: bool) -> dict[int, DirectFile]:
        """Open all files and reserve their space before any work; a fresh pass that does not fit leaves none behind."""
        for window in () if fresh else self.layout.windows:
            path = self._path(window)
            if not path.exists() or path.stat().st_size != self.layout.file_bytes[window]:
                raise Stale(f"{path} is missing or has another size")
        files: dict[int, DirectFile] = {}
        try:
            for window in self.layout.windows:
                assert not fresh or not has_window(self.out, self.plan.first_window + window), "it would be spoilt"
                files[window] = stack.enter_context(DirectFile(self._path(window), "write"))
                if fresh:
                    files[window].truncate(0)
                    files[window].reserve(self.layout.file_bytes[window])
        except (OSError, DoesNotFit):
            for file in files.values() if fresh else ():
                file.path.unlink(missing_ok=True)
            raise
        return files

    def _resume(self, writer: StreamWriter, buffer: NDArray[np.uint8], journal: Journal, states: StreamStates) -> None:
        """Take streams up where they were, after a look at all bytes that are there."""
        self.journal = journal
        # A bucket's bytes are in another order once they are sorted, and in none while they are being replaced; those
        # are compared where they are read.
        replaced = max(0, journal.buckets_done)
        replaced += journal.buckets_done >= 0 and safe_copy(self.out, journal.buckets_done) is not None
        apart = set(self._buckets[:replaced])
        for stream, region in enumerate(self.layout.regions):
            found = writer.resume(stream, int(states["position"][stream]), buffer)
            if stream not in apart and found != int(states["xxh3"][stream]):
                raise Stale(f"{self._path(region.window)} was damaged at byte {region.offset} or behind it")
        self._sorted[:] = states["sorted"]
        self.errors[:, 0], self.errors[:, 1] = states["largest"], states["total"]

    def _write_prefixes(self, writer: StreamWriter, buffer: NDArray[np.uint8]) -> None:
        """Everything of the extents but rows: head, payload, source, admissions, runs of the shared segment."""
        for stream, region in enumerate(self.layout.regions):
            if region.item < 0:
                continue
            self._encode_prefix(region.item, buffer)
            done = 0
            while done < region.prefix_bytes:
                stage, at = writer.begin(stream)
                count = min(len(stage) - at, region.prefix_bytes - done)
                stage[at : at + count] = buffer[done : done + count]
                writer.append(stream, stage, count)
                done += count

    def _encode_prefix(self, item: int, out: NDArray[np.uint8]) -> None:
        head, arrays = self.plan.heads[item], self.arrays
        out[: head.rows_offset] = 0
        encode_extent_head(head, out)
        self.accesses.payload_into(item, out[head.payload_offset :])
        sections = [(head.source_offset, arrays.source), (head.admit_offset, arrays.admits)]
        if arrays.shared is not None:
            sections += [(head.runs_offset, arrays.shared.runs), (head.shared_offset, arrays.shared.offsets)]
        for offset, values in sections:
            data = values.get(item).view(np.uint8)
            out[offset : offset + len(data)] = data

    def _scan(self, reader: PartReader, writer: StreamWriter) -> None:
        """Append every part's runs to the streams; checkpoint now and then, and at the end."""
        saved, total = time.monotonic(), self.layout.total_bytes
        if self.journal.rows_done == 0:
            self._checkpoint(writer, 0)
        for part in reader.parts(self.journal.rows_done):
            gather = partial(self._append_runs, writer, part)
            parallel_for(gather, GATHERERS, GATHERERS)
            self._progress("pack", min(total, int(writer.positions.sum())), total, "bytes")
            if part.hi == self.plan.table.num_rows or time.monotonic() - saved >= self._checkpoint_s:
                self._checkpoint(writer, part.hi)
                saved = time.monotonic()

    def _append_runs(self, writer: StreamWriter, part: Part, lo: int, hi: int) -> None:
        """What threads lo..hi-1 do; a stream stays with its thread."""
        row_bytes = self.plan.meta.row_format.row_bytes
        for gatherer in range(lo, hi):
            source = self.sources[gatherer]
            for stream in range(gatherer, len(self.layout.regions), GATHERERS):
                for ids in self._ids_below(stream, writer, part.hi):
                    stage, at = writer.begin(stream)
                    num_bytes = len(ids) * row_bytes
                    source.copy(part, ids, stage[at : at + num_bytes], self.errors[stream])
                    writer.append(stream, stage, num_bytes)

    def _ids_below(self, stream: int, writer: StreamWriter, end: int) -> Iterator[NDArray[np.int64]]:
        """The next ids of a stream that are below `end`, a staging buffer's worth at a time."""
        region, bucket = self.layout.regions[stream], None
        row = (int(writer.positions[stream]) - region.prefix_bytes) // self.plan.meta.row_format.row_bytes
        while row < region.num_rows and self._next_ids[stream] < end:
            past = min(row + self._chunk_rows, region.num_rows)
            if region.item >= 0:
                ids = self.arrays.missing.get(region.item, row, past)
            else:
                assert self.arrays.shared is not None
                bucket = bucket_order(self.arrays.shared, region)[0] if bucket is None else bucket
                ids = bucket[row:past]
            count = int(np.searchsorted(ids, end))
            if count:
                yield ids[:count]
                row += count
            if count < len(ids):
                self._next_ids[stream] = ids[count]

    def _checkpoint(self, writer: StreamWriter, rows_done: int, buckets_done: int = -1) -> None:
        writer.sync()
        self.journal = replace(self.journal, rows_done=rows_done, buckets_done=buckets_done)
        states = np.empty(len(self.layout.regions), STATE)
        states["position"], states["xxh3"] = writer.positions, [digest.intdigest() for digest in writer.digests]
        states["sorted"] = self._sorted
        states["largest"], states["total"] = self.errors.T
        write_journal(self.out, self.journal, states)

    def _window_errors(self) -> dict[int, tuple[float, float, int]]:
        """Per window what conversion changed, in an order that depends on neither memory nor kills."""
        found = {}
        for window in self.layout.windows:
            streams = [n for n, region in enumerate(self.layout.regions) if region.window == window]
            rows = sum(self.layout.regions[n].num_rows for n in streams)
            largest, total = float(self.errors[streams, 0].max()), math.fsum(self.errors[streams, 1])
            found[self.plan.first_window + window] = (largest, total, rows)
        return found

    def _sort_segments(
        self, files: dict[int, DirectFile], writer: StreamWriter, buffers: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    ) -> None:
        rows_done = self.journal.rows_done
        self._checkpoint(writer, rows_done, max(0, self.journal.buckets_done))

        def note(done: int, xxh3: int) -> None:
            self._sorted[self._buckets[done - 1]] = xxh3
            self._checkpoint(writer, rows_done, done)

        sort_buckets(
            self.plan,
            [self.layout.regions[stream] for stream in self._buckets],
            files,
            self.out,
            buffers,
            [writer.digests[stream].intdigest() for stream in self._buckets],
            done=self.journal.buckets_done,
            on_done=note,
        )

    def _publish(self, files: dict[int, DirectFile], writer: StreamWriter, buffer: NDArray[np.uint8]) -> None:
        for window in self.layout.windows:
            if has_window(self.out, self.plan.first_window + window):
                continue  # a killed run had come this far
            number, shared = self.plan.first_window + window, self.layout.shared_bytes[window]
            mine = [stream for stream in self._buckets if self.layout.regions[stream].window == window]
            buckets, sums = [self.layout.regions[stream] for stream in mine], self._sorted[mine].tolist()
            pages = segment_sums(self.plan, buckets, sums, files[window], buffer)
            os.replace(files[window].path, self.out / window_name(number, "pack"))
            arrays: dict[str, NDArray[Any]] = {"residents": self.arrays.residents[window]}
            arrays |= {"pages": pages} if shared else {}
            if self.plan.mode == "reuse" and number == self.plan.meta.num_windows - 1:
                arrays["wrap"] = self.arrays.wrap
            sums = {
                f"{name}_xxh3": write_npy(self.out / window_name(number, f"{name}.npy"), array).xxh3
                for name, array in arrays.items()
            }
            fsync_folder(self.out)
            write_pack_index(self.out, self._index(window, writer, sums))
        delete_journal(self.out)

    def _index(self, window: int, writer: StreamWriter, sums: dict[str, str]) -> PackIndex:
        streams = [n for n, r in enumerate(self.layout.regions) if r.window == window and r.item >= 0]
        regions = [self.layout.regions[n] for n in streams]
        heads = [self.plan.heads[region.item] for region in regions]
        return PackIndex(
            window=self.plan.first_window + window,
            first_item=heads[0].item,
            offsets=tuple(region.offset for region in regions),
            bytes=tuple(head.extent_bytes for head in heads),
            max_inputs=max(head.num_inputs for head in heads),
            xxh3=tuple(str(writer.digests[n].hexdigest()) for n in streams),
            shared_bytes=self.layout.shared_bytes[window],
            **sums,
        )
