"""Where the threads of other processes are: each writes its stacks to a file of its own when it is sent SIGUSR1.

The file is opened when a process starts, so that it can be written to however badly the process fares; the handler is
`faulthandler`'s, in C, so it works while the interpreter waits for a lock. A process that a signal stopped is let go on
for as long as that takes. Nothing here imports more than Python has: Ray runs it in small tasks on other nodes.
"""

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

_SIGNAL = signal.SIGUSR1
_PATIENCE_S = 1.0
_POLL_S = 0.01
_FROZEN = "stopped by a signal (SIGSTOP)"
# frames of a rank's own thread, whichever backend runs it; and of what waits for other ranks
_OWN = re.compile(r"(?:worker|threads)\.py\W.* in (?:answer_call|_serve)$", re.MULTILINE)
_WAITS = re.compile(r"transport\.py\W.* in (?:_wait|_post)$|torch.distributed.\w+\.py\W", re.MULTILINE)


def stacks_file(scratch: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return scratch / f"stacks-{rank}.txt"


def write_when_asked(path: Path) -> None:
    """From now on write the stacks of all threads of this process to `path` at every SIGUSR1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # never closed: faulthandler writes to it as long as this process lives
    faulthandler.register(_SIGNAL, open(path, "wb"), all_threads=True)  # noqa: SIM115


def collect(pids: Mapping[int, int], files: Mapping[int, Path]) -> dict[int, str]:
    """The stacks of processes of this machine, by rank; what is known of those that do not write any.

    Takes 2 s at most. Processes that were stopped by a signal are stopped again; they may have gone on a little.
    """
    before = {rank: _size(path) for rank, path in files.items()}
    asked = [rank for rank, pid in pids.items() if _listens(pid) and _ask(pid)]
    found = _read([rank for rank in asked if _state(pids[rank]) not in ("T", "t")], files, before)
    # not before now: a process may take a while to come to a stop
    frozen = {rank for rank in asked if rank not in found and _state(pids[rank]) in ("T", "t")}
    for rank in sorted(frozen):
        _send(pids[rank], signal.SIGCONT)  # what was sent before is handled first
    for rank, text in _read(sorted(frozen), files, before).items():
        found[rank] = f"{_FROZEN}\n\n{text}"
    for rank in frozen:
        _send(pids[rank], signal.SIGSTOP)
        found.setdefault(rank, _FROZEN)
    return {rank: found.get(rank) or _describe(pid) for rank, pid in pids.items()}


def _read(ranks: list[int], files: Mapping[int, Path], before: Mapping[int, int]) -> dict[int, str]:
    """What was added to files, of those to which something was; waits until they do not grow any more."""
    sizes, ends, quiet = dict(before), time.monotonic() + _PATIENCE_S, 0
    while ranks and time.monotonic() < ends and quiet < 3:
        time.sleep(_POLL_S)
        now = {rank: _size(files[rank]) for rank in ranks}
        quiet = quiet + 1 if all(now[rank] == sizes[rank] > before[rank] for rank in ranks) else 0
        sizes |= now
    return {
        rank: files[rank].read_bytes()[before[rank] :].decode(errors="replace")
        for rank in ranks
        if sizes[rank] > before[rank]
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _ask(pid: int) -> bool:
    """Send the signal to the main thread, so that it writes before it goes on, where that was stopped."""
    with contextlib.suppress(AttributeError):  # glibc 2.30 and later have it
        return bool(ctypes.CDLL(None).tgkill(pid, pid, int(_SIGNAL)) == 0)
    return _send(pid, _SIGNAL)


def _send(pid: int, number: int) -> bool:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _status(pid: int, name: str) -> str:
    """A line of /proc/<pid>/status; empty where there is none."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{name}:\s*(\S+)", text, re.MULTILINE)
    return "" if found is None else found[1]


def _state(pid: int) -> str:
    return _status(pid, "State")


def _listens(pid: int) -> bool:
    """Whether the signal is handled: it would end a process that has only just started."""
    caught = _status(pid, "SigCgt")
    return bool(caught) and bool(int(caught, 16) >> (_SIGNAL - 1) & 1)


def _describe(pid: int) -> str:
    """What is known of a process that wrote nothing."""
    state = _state(pid)
    if state in ("", "Z", "X"):
        return "its process has ended"
    if state in ("T", "t"):
        return _FROZEN
    if state == "D":
        try:
            where = Path(f"/proc/{pid}/wchan").read_text()
        except OSError:
            where = ""
        return f"in uninterruptible sleep in the kernel{f', in {where}' if where.strip('0') else ''}"
    if not _listens(pid):
        return f"its process has not come so far as to tell where it is (state {state})"
    return f"it did not write its stacks within {_PATIENCE_S:.0f} s (state {state})"


def of_threads(idents: Mapping[int, int | None]) -> dict[int, str]:
    """The stacks of threads of this process, by rank, in the form in which processes write theirs."""
    frames = sys._current_frames()
    found = {}
    for rank, ident in idents.items():
        frame = None if ident is None else frames.get(ident)
        lines = [] if frame is None else reversed(traceback.extract_stack(frame))
        stack = "".join(f'  File "{line.filename}", line {line.lineno} in {line.name}\n' for line in lines)
        found[rank] = f"Thread {ident} (most recent call first):\n{stack}" if stack else "its thread has ended"
    return found


def is_frozen(text: str) -> bool:
    """Whether a collected stack is of a process that a signal stopped."""
    return text.startswith(_FROZEN)


def waits_for_others(text: str) -> bool:
    """Whether a collected stack is of a rank that waits for what another sends, or takes."""
    return any(_OWN.search(thread) and _WAITS.search(thread) for thread in text.split("\n\n"))


def excerpt(text: str, num_lines: int = 40) -> str:
    """The first lines of a collected stack; those of the thread that does the rank's work come first."""
    first, *others = [part for part in text.strip().split("\n\n") if part]
    head = [first] if "most recent call first" not in first else []
    threads = others if head else [first, *others]
    threads.sort(key=lambda thread: (not _OWN.search(thread), not thread.startswith("Current")))
    lines = "\n".join([*head, *threads]).splitlines()
    left = len(lines) - num_lines
    return "\n".join(lines if left <= 0 else [*lines[:num_lines], f"... and {left} lines more"])
