"""Gather rows from host tier and extent and decode them to float32; admit rows into slots; move rows between slots.

Rows are strings of `row_words` words (uint32 for float32, uint16 for float16 and bfloat16, bytes for int8) in two flat
arrays. A code c < `num_slots` is the row at word c * row_words of `tier`; else, with r = c - num_slots, it is extent
row r: r < `num_private` lies at word rows_at + r * row_words of `extent`, the rest at word shared_at[r - num_private].
Every gather has the same signature and writes the bits of float32 values, so that one wrapper serves all dtypes.

A random row costs a wait for memory; prefetching some rows ahead hides it: on the reference machine rows of 512 bytes
from a 1 GB table came twice as fast. Large float32 outputs are stored past the caches (see `stream`), which again made
it 1.7 times as fast.
"""

import numpy as np
from numba import njit

from penstock.kernels.prefetch import prefetch
from penstock.kernels.stream import stream_fence, stream_words

_AHEAD = 8  # rows; 4 to 16 were equally fast
_STREAM_WORDS = 2 << 20  # outputs of 8 MiB and more, which other cores will not find in a cache anyway
_SIGN, _REST, _EXPONENT = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(0x7C00)
_S13, _S16 = np.uint32(13), np.uint32(16)
_REBIAS = np.uint32(112 << 23)  # float32's exponent bias 127 less float16's 15
_TINY = np.float32(2.0**-24)  # float16's smallest subnormal


@njit(cache=True, nogil=True, inline="always")
def _hint(code, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, line_words):  # type: ignore[no-untyped-def]
    if code < num_slots:
        start = np.int64(code) * row_words
        for line in range(0, row_words, line_words):
            prefetch(tier, start + line)
    else:
        row = np.int64(code) - num_slots
        start = rows_at + row * row_words if row < num_private else shared_at[row - num_private]
        for line in range(0, row_words, line_words):
            prefetch(extent, start + line)


@njit(cache=True, nogil=True, inline="always")
def _locate(code, num_slots, num_private, tier, extent, rows_at, shared_at, row_words):  # type: ignore[no-untyped-def]
    if code < num_slots:
        start = np.int64(code) * row_words
        return tier[start : start + row_words]
    row = np.int64(code) - num_slots
    start = rows_at + row * row_words if row < num_private else shared_at[row - num_private]
    return extent[start : start + row_words]


@njit(cache=True, nogil=True)
def gather_float32(codes, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, out, lo, hi):  # type: ignore[no-untyped-def]
    """Copy float32 rows: `tier`, `extent` uint32; `out` uint32 [M, F]; rows lo <= n < hi of `codes` int32 [M]."""
    if out.size >= _STREAM_WORDS and row_words % 16 == 0 and out.ctypes.data % 64 == 0:
        _stream_float32(codes, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, out, lo, hi)
        return
    for n in range(lo, hi):
        if n + _AHEAD < hi:
            _hint(codes[n + _AHEAD], num_slots, num_private, tier, extent, rows_at, shared_at, row_words, 16)
        row = _locate(codes[n], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
        to = out[n]
        for f in range(row_words):
            to[f] = row[f]


@njit(cache=True, nogil=True)
def _stream_float32(codes, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, out, lo, hi):  # type: ignore[no-untyped-def]
    """Written out, without slices and inlined calls: to count their references is to flush the write buffers."""
    for n in range(lo, hi):
        if n + _AHEAD < hi:
            code = np.int64(codes[n + _AHEAD])
            if code < num_slots:
                for f in range(0, row_words, 16):
                    prefetch(tier, code * row_words + f)
            else:
                row = code - num_slots
                start = rows_at + row * row_words if row < num_private else shared_at[row - num_private]
                for f in range(0, row_words, 16):
                    prefetch(extent, start + f)
        code = np.int64(codes[n])
        if code < num_slots:
            for f in range(0, row_words, 16):
                stream_words(tier, code * row_words + f, out, n * row_words + f)
        else:
            row = code - num_slots
            start = rows_at + row * row_words if row < num_private else shared_at[row - num_private]
            for f in range(0, row_words, 16):
                stream_words(extent, start + f, out, n * row_words + f)
    stream_fence()


@njit(cache=True, nogil=True)
def gather_float16(codes, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, out, lo, hi):  # type: ignore[no-untyped-def]
    """Decode float16 rows, exactly, subnormals too: `tier`, `extent` uint16; the rest as `gather_float32`."""
    for n in range(lo, hi):
        if n + _AHEAD < hi:
            _hint(codes[n + _AHEAD], num_slots, num_private, tier, extent, rows_at, shared_at, row_words, 32)
        row = _locate(codes[n], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
        to = out[n]
        for f in range(row_words):
            half = np.uint32(row[f])
            rest = half & _REST
            # No float32 subnormal on the way: threads may flush those to zero.
            small = np.float32(np.float32(rest) * _TINY).view(np.uint32)
            large = (rest << _S13) + _REBIAS
            special = large + _REBIAS
            exponent = half & _EXPONENT
            bits = small if exponent == 0 else (special if exponent == _EXPONENT else large)
            to[f] = bits | ((half & _SIGN) << _S16)


@njit(cache=True, nogil=True)
def gather_bfloat16(codes, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, out, lo, hi):  # type: ignore[no-untyped-def]
    """Decode bfloat16 rows: `tier`, `extent` uint16; the rest as `gather_float32`."""
    for n in range(lo, hi):
        if n + _AHEAD < hi:
            _hint(codes[n + _AHEAD], num_slots, num_private, tier, extent, rows_at, shared_at, row_words, 32)
        row = _locate(codes[n], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
        to = out[n]
        for f in range(row_words):
            to[f] = np.uint32(row[f]) << _S16


@njit(cache=True, nogil=True)
def gather_int8(codes, num_slots, num_private, tier, extent, rows_at, shared_at, row_words, out, lo, hi):  # type: ignore[no-untyped-def]
    """Decode int8 rows with their scale: `tier`, `extent` uint8, row_words = F + 4; the rest as `gather_float32`."""
    width = row_words - 4
    for n in range(lo, hi):
        if n + _AHEAD < hi:
            _hint(codes[n + _AHEAD], num_slots, num_private, tier, extent, rows_at, shared_at, row_words, 64)
        row = _locate(codes[n], num_slots, num_private, tier, extent, rows_at, shared_at, row_words)
        to = out[n]
        bits = np.uint32(0)
        for byte in range(4):  # rows of odd width are not aligned
            bits |= np.uint32(row[width + byte]) << np.uint32(8 * byte)
        scale = np.uint32(bits).view(np.float32)
        for f in range(width):
            to[f] = np.float32(np.float32(np.int8(row[f])) * scale).view(np.uint32)


@njit(cache=True, nogil=True)
def admit_rows(rows, slots, num_private, tier, extent, rows_at, shared_at, row_words):  # type: ignore[no-untyped-def]
    """Copy extent rows `rows` int32 [n] into tier slots `slots` int32 [n]; words as in the gathers."""
    for n in range(len(rows)):
        if n + _AHEAD < len(rows):
            row = np.int64(rows[n + _AHEAD])
            start = rows_at + row * row_words if row < num_private else shared_at[row - num_private]
            to = np.int64(slots[n + _AHEAD]) * row_words
            for word in range(0, row_words, 16):
                prefetch(extent, start + word)
                prefetch(tier, to + word)
        row = np.int64(rows[n])
        start = rows_at + row * row_words if row < num_private else shared_at[row - num_private]
        to = np.int64(slots[n]) * row_words
        for word in range(row_words):
            tier[to + word] = extent[start + word]


@njit(cache=True, nogil=True)
def move_rows(tier, sources, targets, row_words, spare, origin, readers):  # type: ignore[no-untyped-def]
    """Move row sources[k] to slot targets[k] for all k at once, in place; targets are distinct.

    `spare` holds one row; `origin` int32 [slots] is -1 and `readers` int32 [slots] 0 everywhere, before and after.
    Chains are moved from their free end; what is left then are cycles, which need the spare row.
    """
    for k in range(len(sources)):
        if sources[k] != targets[k]:
            origin[targets[k]] = sources[k]
            readers[sources[k]] += 1
    for k in range(len(targets)):
        slot = targets[k]
        while origin[slot] >= 0 and readers[slot] == 0:
            source = origin[slot]
            _copy(tier, source, slot, row_words)
            origin[slot] = -1
            readers[source] -= 1
            slot = source
    for k in range(len(targets)):
        first = targets[k]
        if origin[first] < 0:
            continue
        for word in range(row_words):
            spare[word] = tier[np.int64(first) * row_words + word]
        slot = first
        while origin[slot] != first:
            source = origin[slot]
            _copy(tier, source, slot, row_words)
            origin[slot] = -1
            readers[source] -= 1
            slot = source
        for word in range(row_words):
            tier[np.int64(slot) * row_words + word] = spare[word]
        origin[slot] = -1
        readers[first] -= 1


@njit(cache=True, nogil=True, inline="always")
def _copy(tier, source, target, row_words):  # type: ignore[no-untyped-def]
    start, to = np.int64(source) * row_words, np.int64(target) * row_words
    for word in range(row_words):
        tier[to + word] = tier[start + word]
