"""What rolling windows told of the items to come, kept in the folder that they are made in.

Windows are sized by some items where training starts. Where a later item, or a window, turns out larger, that is
written down and windows are sized anew: every start knows more than the one before it, so that none meets the same item
in vain, be it of the same run or of one that was resumed.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from penstock.storage.errors import FormatError
from penstock.storage.manifest import read_json, write_json
from penstock.storage.pack import trace_digest
from penstock.storage.trace import TraceMeta

NAME = "known.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Inputs and payload of the largest items met, and the items of a window that fitted `disk_bytes`, 0 if not met."""

    trace: str
    num_inputs: int = 0
    payload_bytes: int = 0
    window_items: int = 0
    disk_bytes: int = 0

    def largest(self, num_inputs: int, payload_bytes: int) -> "Known":
        """Know of items of these sizes too."""
        return replace(
            self,
            num_inputs=max(self.num_inputs, num_inputs),
            payload_bytes=max(self.payload_bytes, payload_bytes),
        )

    def most_items(self, disk_bytes: int, window_items: int) -> int:
        """At most as many items per window as fitted this much disk, or more of it."""
        binds = self.window_items and disk_bytes <= self.disk_bytes
        return min(window_items, self.window_items) if binds else window_items


def read_known(folder: Path, trace: TraceMeta) -> Known:
    """What is known of this trace's items, however many epochs and items per window it has; nothing of others'."""
    nothing = Known(trace=trace_digest(replace(trace, num_epochs=1, window_items=1)))
    try:
        found = Known(**read_json(folder / NAME))
    except (FormatError, TypeError):
        return nothing
    return found if found.trace == nothing.trace else nothing


def write_known(folder: Path, known: Known) -> None:
    """Keep it for the next start."""
    write_json(folder / NAME, asdict(known))
