"""Where the seconds of a run went: in `result.json` every one of them has a name, and one name only.

| `timings` | is the sum of |
|---|---|
| `total_s` | `prepare_s`, `train_s`, `test_s`, `save_s` |
| `prepare_s` | `sample_s`, `plan_s`, `pack_s`, `cut_s` (full graph), `setup_s` |
| `train_s` | `start_s`, `compute_s`, `stall_s`, `reduce_s`, `evaluate_s`, `checkpoint_s`, `record_s` |

`setup_s` are checks, starting replicas, and all else of preparing; `test_s` the last scores; `save_s` model, pictures,
report; `start_s` optimizer, ranks, checkpoint, opening and closing feeds; `stall_s` waiting for the feed; `reduce_s`
waiting for other replicas or ranks; `record_s` all else of training.

A step that did not happen takes no second. Of several replicas or ranks, `stall_s` and `reduce_s` are means.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_TRAIN = ("start", "compute", "stall", "reduce", "evaluate", "checkpoint", "record")


class Timings:
    """Seconds by name, from when it was made; for one thread, and for steps that do not lie within each other."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.spent: dict[str, float] = {}

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count the seconds of a block, also where it raises."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.spent[name] = self.spent.get(name, 0.0) + seconds

    @property
    def total_s(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._began


def timings_section(
    *, total_s: float, prepare_s: float, steps: Mapping[str, float], train: Mapping[str, float], test_s: float
) -> dict[str, float]:
    """The section of `result.json`: `steps` are the parts of `prepare_s`, `train` what `TrainResult.times` has."""
    train_s = sum(train.values())
    return {
        "total_s": total_s,
        "prepare_s": prepare_s,
        **{f"{name}_s": seconds for name, seconds in steps.items()},
        "setup_s": max(0.0, prepare_s - sum(steps.values())),
        "train_s": train_s,
        **{f"{name}_s": train.get(name, 0.0) for name in _TRAIN},
        "test_s": test_s,
        "save_s": max(0.0, total_s - prepare_s - train_s - test_s),
    }
