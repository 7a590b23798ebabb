"""What is derived from a block's structure, kept beside it for blocks that serve many layers and epochs."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

_Made = TypeVar("_Made")


class BlockCache:
    """Derived values by name, each made at first use: the transposed block, the block with self-loops, GCN's scales.

    One per block structure: blocks that differ in draws only share it. A value made by two threads at once is made
    twice, with the same bits. It holds memory for as long as it lives, for a block of S sources and E edges up to
    4 (S + 2 E) bytes for a transposed one and 4 (S + E) for one with self-loops.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def get(self, name: str, make: Callable[[], _Made]) -> _Made:
        """Return the value of that name, which `make` makes if it is not there yet."""
        found = self._made.get(name)
        if found is None:
            found = self._made[name] = make()
        return cast(_Made, found)  # a name belongs to one caller, which always makes the same type


def derived(cache: BlockCache | None, name: str, make: Callable[[], _Made]) -> _Made:
    """Make a value, or take it from the cache where there is one."""
    return make() if cache is None else cache.get(name, make)
