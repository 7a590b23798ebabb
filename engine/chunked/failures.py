"""How errors cross from a rank to who called it, and how a death reads."""

import pickle
import signal
import traceback
from typing import Any

from penstock.engine.chunked.backend import Board, RankFailed, WorkerSpec
from penstock.engine.chunked.schedule import EpochPlan
from penstock.engine.chunked.transport import PeerLost
from penstock.storage.errors import ForeignError, is_ours
from penstock.storage.history import StaleRead

# errors that a caller can tell apart; OSError is a full disk, among others
_CARRIED = (ValueError, TypeError, OSError, MemoryError, ImportError, ForeignError, StaleRead, PeerLost, RankFailed)


def encode_error(spec: WorkerSpec, error: BaseException) -> bytes:
    """Pickle an error as it is, if it is of a kind that callers know; any other as RankFailed with its traceback."""
    if isinstance(error, ValueError) and not is_ours(error):  # no mistake of the configuration, and nothing to retry
        error = ForeignError("".join(traceback.format_exception(error)))
    if isinstance(error, _CARRIED):
        try:
            data = pickle.dumps(error)
            if type(pickle.loads(data)) is type(error):
                return data
        except Exception:  # noqa: S110  anything may be wrong with how others' classes pickle; the text always does
            pass
    text = "".join(traceback.format_exception(error))
    return pickle.dumps(RankFailed(f"{spec.place} failed with {type(error).__name__}: {error}\n{text}"))


def exit_reason(code: int) -> str:
    """Read a process's return code as `subprocess` gives it, negative for a signal."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = ": out of memory, perhaps (see dmesg)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def during(spec: WorkerSpec, method: str, arguments: tuple[Any, ...], board: Board, *, is_current: bool = True) -> str:
    """Say at which action of which call a rank is. `is_current`: whether the board knows that."""
    done, total, _ = board.read()[spec.rank]
    plan = next((argument for argument in arguments if isinstance(argument, EpochPlan)), None)
    if plan is not None:
        actions = plan.actions[spec.rank]
        least, at = ("", f", at {actions[done]}") if is_current and done < len(actions) else ("at least ", "")
        return f"during {method} of epoch {plan.epoch}, after {least}{done} of {len(actions)} actions{at}"
    least = "" if is_current else "at least "
    return f"during {method}, after {least}{done} of {total} actions" if total else f"during {method}"


def died(
    spec: WorkerSpec,
    reason: str,
    where: str,
    method: str,
    arguments: tuple[Any, ...],
    board: Board,
    *,
    is_current: bool = True,
) -> RankFailed:
    """Say which rank died, of what, where it ran, and at which action of which call."""
    at = during(spec, method, arguments, board, is_current=is_current)
    return RankFailed(
        f"{spec.place} {reason} ({where}); {at}. Its log may say more; run again, it goes on from the last checkpoint"
    )
