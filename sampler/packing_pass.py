"""One pass of the packer: scan the feature table once and write some windows.

The order of events makes it safe to be killed anywhere: files are reserved, item metadata and rows are appended, a
journal is written after their sync, shared segments are sorted, files are renamed, and each window's index comes last.
"""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.kernels.parallel import parallel_for
from penstock.sampler.accesses import Accesses
from penstock.sampler.journal import Journal, delete_journal, read_journal, write_journal
from penstock.sampler.part_reader import Part, PartReader
from penstock.sampler.pass_layout import GATHERERS, PassLayout, PassMemory, lay_out, part_bounds
from penstock.sampler.plan import Plan
from penstock.sampler.recording import PlanArrays
from penstock.sampler.row_source import RowSource, Tally, write_row_error
from penstock.sampler.segment_order import bucket_order, segment_digest, sort_buckets
from penstock.sampler.streams import StreamWriter
from penstock.storage.directio import PAGE, DirectFile
from penstock.storage.errors import DoesNotFit
from penstock.storage.manifest import fsync_folder
from penstock.storage.npyfile import write_npy
from penstock.storage.pack import PackIndex, encode_extent_head, has_window, write_pack_index
from penstock.storage.progress import Progress
from penstock.storage.trace import window_name

CHECKPOINT_S = 10.0


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
        self.journal = Journal(
            plan=plan.digest, windows=tuple(windows), part_rows=memory.part_rows, bucket_rows=memory.bucket_rows
        )
        self.sources = [RowSource(plan.stored, plan.meta.row_format, self._chunk_rows) for _ in range(GATHERERS)]
        self._progress, self._checkpoint_s = progress, checkpoint_s

    @property
    def _chunk_rows(self) -> int:
        return max(1, (self.memory.stage_bytes - PAGE) // self.plan.meta.row_format.row_bytes)

    def run(self) -> None:
        """Pack, or go on where a killed run with the same plan and memory was. DoesNotFit where the disk is full."""
        with ExitStack() as stack:
            found = read_journal(self.out)
            resumed = found is not None and found[0].same_pass(self.journal) and self._files_exist()
            files = self._open_files(stack, fresh=not resumed)
            reader = stack.enter_context(
                PartReader(self.plan.table, self.memory.part_rows, self.arrays.needed, self.memory.buffer_bytes)
            )
            writer = stack.enter_context(StreamWriter(self.layout.regions, files, self.memory.stage_bytes))
            bounds = self._bounds(reader.starts())
            if resumed and found is not None:
                self._resume(writer, bounds, reader.buffers[0], *found)
            else:
                self._write_prefixes(writer, reader.buffers[0])
            self._scan(reader, writer, bounds)
            self._finish(writer)
            if any(self.layout.shared_bytes.values()):
                self._sort_segments(files, writer, reader.buffers)
            if self.sources[0].lossy:
                write_row_error(self.out, self.plan.first_window + self.layout.windows[0], self._tallies())
            self._publish(files, writer, reader.buffers[0])

    def _path(self, window: int) -> Path:
        """The window's file: the finished name if a killed run got as far as renaming it."""
        final = self.out / window_name(self.plan.first_window + window, "pack")
        partial = final.with_name(final.name + ".partial")
        return final if final.exists() and not partial.exists() else partial

    def _files_exist(self) -> bool:
        return all(self._path(window).exists() for window in self.layout.windows)

    def _open_files(self, stack: ExitStack, *, fresh: bool) -> dict[int, DirectFile]:
        """Open all files and reserve their space before any work; a fresh pass that does not fit leaves none behind."""
        if fresh:
            delete_journal(self.out)
            for leftover in [*self.out.glob("window-*.pack.partial"), *self.out.glob("bucket-*")]:
                leftover.unlink()
        files: dict[int, DirectFile] = {}
        try:
            for window in self.layout.windows:
                files[window] = stack.enter_context(DirectFile(self._path(window), "write"))
                if fresh:
                    files[window].truncate(0)
                    files[window].reserve(self.layout.file_bytes[window])
        except (OSError, DoesNotFit):
            for file in files.values() if fresh else ():
                file.path.unlink(missing_ok=True)
            raise
        return files

    def _ids(self, stream: int, lo: int, hi: int | None) -> NDArray[np.int64]:
        region = self.layout.regions[stream]
        if region.item >= 0:
            ids: NDArray[np.int64] = self.arrays.missing.get(region.item, lo, hi)
            return ids
        assert self.arrays.shared is not None
        return bucket_order(self.arrays.shared, region)[0][lo:hi]

    def _bounds(self, starts: NDArray[np.int64]) -> NDArray[np.int32]:
        bounds = np.empty((len(self.layout.regions), len(starts)), np.int32)
        for stream in range(len(bounds)):
            bounds[stream] = part_bounds(self._ids(stream, 0, None), starts)
        return bounds

    def _resume(
        self,
        writer: StreamWriter,
        bounds: NDArray[np.int32],
        buffer: NDArray[np.uint8],
        journal: Journal,
        tails: NDArray[np.uint8],
    ) -> None:
        self.journal = journal
        for source, tally in zip(self.sources, journal.tallies, strict=True):
            source.tally = tally
        row_bytes = self.plan.meta.row_format.row_bytes
        for stream, region in enumerate(self.layout.regions):
            position = region.prefix_bytes + int(bounds[stream, journal.parts_done]) * row_bytes
            writer.resume(stream, position, tails[stream], buffer)

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

    def _scan(self, reader: PartReader, writer: StreamWriter, bounds: NDArray[np.int32]) -> None:
        """Append every part's runs to the streams; checkpoint now and then, and at the end."""
        saved, total = time.monotonic(), self.layout.total_bytes
        if self.journal.parts_done == 0:
            self._checkpoint(writer, 0)
        for part in reader.parts(self.journal.parts_done):
            last = part.number == reader.num_parts - 1
            gather = partial(self._append_runs, writer, part, bounds)
            parallel_for(gather, GATHERERS, GATHERERS)
            self._progress("pack", min(total, int(writer.positions.sum())), total, "bytes")
            if last or time.monotonic() - saved >= self._checkpoint_s:
                self._checkpoint(writer, part.number + 1)
                saved = time.monotonic()

    def _append_runs(self, writer: StreamWriter, part: Part, bounds: NDArray[np.int32], lo: int, hi: int) -> None:
        """What threads lo..hi-1 do; every stream has its thread, so that tallies do not depend on timing."""
        for gatherer in range(lo, hi):
            for stream in range(gatherer, len(self.layout.regions), GATHERERS):
                first, past = int(bounds[stream, part.number]), int(bounds[stream, part.number + 1])
                if past > first:
                    self._append_run(writer, stream, part, self._ids(stream, first, past), self.sources[gatherer])

    def _append_run(
        self, writer: StreamWriter, stream: int, part: Part, ids: NDArray[np.int64], source: RowSource
    ) -> None:
        row_bytes = self.plan.meta.row_format.row_bytes
        for lo in range(0, len(ids), self._chunk_rows):
            chunk = ids[lo : lo + self._chunk_rows]
            stage, at = writer.begin(stream)
            num_bytes = len(chunk) * row_bytes
            source.copy(part, chunk, stage[at : at + num_bytes])
            writer.append(stream, stage, num_bytes)

    def _checkpoint(self, writer: StreamWriter, parts_done: int, buckets_done: int = -1) -> None:
        writer.sync()
        self.journal = replace(self.journal, parts_done=parts_done, buckets_done=buckets_done, tallies=self._tallies())
        write_journal(self.out, self.journal, writer.tails)

    def _tallies(self) -> tuple[Tally, ...]:
        return tuple(source.tally for source in self.sources)

    def _finish(self, writer: StreamWriter) -> None:
        """Write the last page of every stream; not of buckets that are sorted already, which would spoil them."""
        for stream, region in enumerate(self.layout.regions):
            if region.item >= 0 or self.journal.buckets_done < 0:
                writer.finish(stream)
        writer.sync()

    def _sort_segments(
        self, files: dict[int, DirectFile], writer: StreamWriter, buffers: tuple[NDArray[np.uint8], NDArray[np.uint8]]
    ) -> None:
        parts = self.journal.parts_done
        self._checkpoint(writer, parts, max(0, self.journal.buckets_done))
        sort_buckets(
            self.plan,
            [region for region in self.layout.regions if region.item < 0],
            files,
            self.out,
            buffers,
            done=self.journal.buckets_done,
            on_done=lambda done: self._checkpoint(writer, parts, done),
        )

    def _publish(self, files: dict[int, DirectFile], writer: StreamWriter, buffer: NDArray[np.uint8]) -> None:
        for window in self.layout.windows:
            if has_window(self.out, self.plan.first_window + window):
                continue  # a killed run had come this far
            shared = self.layout.shared_bytes[window]
            index = self._index(window, writer, segment_digest(files[window], shared, buffer))
            number = self.plan.first_window + window
            os.replace(files[window].path, self.out / window_name(number, "pack"))
            write_npy(self.out / window_name(number, "residents.npy"), self.arrays.residents[window])
            if self.plan.mode == "reuse" and number == self.plan.meta.num_windows - 1:
                write_npy(self.out / window_name(number, "wrap.npy"), self.arrays.wrap)
            fsync_folder(self.out)
            write_pack_index(self.out, index)
        delete_journal(self.out)

    def _index(self, window: int, writer: StreamWriter, shared_xxh3: str) -> PackIndex:
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
            shared_xxh3=shared_xxh3,
        )
