"""What a call came to: the answers, or the error that explains the others; how errors cross, and how a death reads."""

import pickle
import signal
import time
import traceback
from typing import Any

from penstock.engine.chunked.backend import Board, RankFailed, WorkerSpec, raise_first
from penstock.engine.chunked.schedule import EpochPlan
from penstock.engine.chunked.transport import PeerLost
from penstock.storage.history import StaleRead

# errors that a caller can tell apart; OSError is a full disk, among others
_CARRIED = (ValueError, TypeError, OSError, MemoryError, ImportError, StaleRead, PeerLost, RankFailed)
_SETTLE_S = 2.0  # for how long a lost peer may be explained by what became of the peer


class Outcome:
    """Gathers what the ranks answer to one call."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._found: dict[int, Any] = {}
        self._errors: dict[int, BaseException] = {}
        self._failed_at = 0.0

    def add(self, rank: int, value: Any) -> None:
        """Take a rank's value."""
        self._found[rank] = value

    def fail(self, rank: int, error: BaseException) -> None:
        """Take a rank's error. Its first one stays: that its process ended behind it explains nothing."""
        self._failed_at = self._failed_at or time.monotonic()
        self._errors.setdefault(rank, error)

    @property
    def has_failed(self) -> bool:
        """Whether any rank has failed."""
        return bool(self._errors)

    @property
    def is_over(self) -> bool:
        """Whether to wait no longer: all are there, or an error is that does not merely follow from another."""
        if len(self._found) + len(self._errors) == self._num_ranks:
            return True
        if all(isinstance(error, PeerLost) for error in self._errors.values()):
            return self.has_failed and time.monotonic() - self._failed_at > _SETTLE_S
        return True

    def values(self) -> list[Any]:
        """The values by rank; raises where one failed, see `raise_first`."""
        if self._errors:
            raise_first(list(self._errors.items()))
        return [self._found[rank] for rank in range(self._num_ranks)]


def encode_error(spec: WorkerSpec, error: BaseException) -> bytes:
    """Pickle an error as it is, if it is of a kind that callers know; any other as RankFailed with its traceback."""
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


def died(
    spec: WorkerSpec, reason: str, method: str, arguments: tuple[Any, ...], board: Board, *, is_current: bool = True
) -> RankFailed:
    """Say which rank died, of what, and at which action of which call. `is_current`: whether the board knows that."""
    done, total, _ = board.read()[spec.rank]
    during = f"during {method}"
    plan = next((argument for argument in arguments if isinstance(argument, EpochPlan)), None)
    if plan is not None:
        actions = plan.actions[spec.rank]
        least, at = ("", f", at {actions[done]}") if is_current and done < len(actions) else ("at least ", "")
        during += f" of epoch {plan.epoch}, after {least}{done} of {len(actions)} actions{at}"
    elif total:
        during += f", after {done} of {total} actions"
    return RankFailed(
        f"{spec.place} {reason}; {during}. Its log may say more; run again, it goes on from the last checkpoint"
    )
