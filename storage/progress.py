"""How long steps report what they do; the command line draws it, everything else may ignore it."""

from typing import Protocol


class Progress(Protocol):
    """Called now and then from the working thread; must return fast. What it raises ends the step, resumably."""

    def __call__(self, stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
        """`stage` is at `done` of `total` `unit`s (`bytes`, `items`, `rows`, `edges`); `numbers` are worth showing."""


def silent(stage: str, done: int, total: int, unit: str, /, **numbers: float) -> None:
    """A `Progress` that shows nothing."""
