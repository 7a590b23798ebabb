"""Budgets that suffice, found by trying them: what a message names is then accepted by the same command."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from penstock.run import Run
from penstock.storage.budget import Budgets, format_bytes
from penstock.storage.errors import DoesNotFit

_TRIES = 8  # each raises a budget to what the last try lacked
_Found = TypeVar("_Found")


def with_remedy(run: Run, prepare: Callable[[], _Found]) -> _Found:
    """Call `prepare`, which reads `run.budgets`. Where they are too small, it is called with larger ones until it has
    enough, and DoesNotFit names those; nothing that takes long may come after what may not fit.

    Errors that do not say how much is lacking pass as they are. `host_bytes` and `disk_bytes` are of the whole run.
    """
    asked = run.budgets
    try:
        return prepare()
    except DoesNotFit as lacking:
        first = error = lacking
    try:
        for _ in range(_TRIES):
            run.budgets = _raised(run.budgets, error)
            try:
                prepare()
                break
            except DoesNotFit as again:
                error = again
    finally:
        found, run.budgets = run.budgets, asked
    raise _naming(asked, found, first)


def _raised(budgets: Budgets, lacking: DoesNotFit) -> Budgets:
    host = max(budgets.host_bytes, lacking.host_bytes or 0)
    disk = max(budgets.disk_bytes, lacking.disk_bytes or 0)
    if (host, disk) == (budgets.host_bytes, budgets.disk_bytes):
        raise lacking
    return replace(budgets, host_bytes=host, disk_bytes=disk)


def _naming(asked: Budgets, found: Budgets, first: DoesNotFit) -> DoesNotFit:
    small, use = [], []
    for flag, before, after in (
        ("--host-memory", asked.host_bytes, found.host_bytes),
        ("--disk", asked.disk_bytes, found.disk_bytes),
    ):
        if after > before:
            small.append(f"{flag} {format_bytes(before)}")
            use.append(f"{flag} {after} or more")
    lacks = f"{' and '.join(small)} is too small: "
    problem = str(first).partition("; use ")[0].removeprefix(lacks)
    return DoesNotFit(
        f"{lacks}{problem}; use {' and '.join(use)}, or a smaller job (batch size, "
        "fanouts, row dtype, sampled_epochs; more chunks)",
        host_bytes=found.host_bytes,
        disk_bytes=found.disk_bytes,
    )
