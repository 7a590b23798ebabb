"""Whether a call shows what it does: by default only where somebody watches, on a terminal or in a notebook."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from penstock.storage.progress import Progress, silent

Show = Progress | bool | None  # None: where somebody watches; a callable is told instead


def is_watched() -> bool:
    """Whether stderr is a terminal, or this is a cell of a notebook."""
    ipython = sys.modules.get("IPython")
    return sys.stderr.isatty() or (ipython is not None and ipython.get_ipython() is not None)


@contextmanager
def shown(show: Show) -> Iterator[Progress]:
    """What long steps report to, as the caller wants it."""
    if callable(show):
        yield show
    elif show is False or (show is None and not is_watched()):
        yield silent
    else:
        from penstock.display import progress  # rich takes a tenth of a second, which a quiet call does not pay

        with progress() as found:
            yield found


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Bars on a terminal, lines elsewhere, for functions that take `progress` and are silent without:

    with penstock.show_progress() as show:
        penstock.ingest_parquet("nodes.parquet", "edges.parquet", "papers.graph", progress=show)
    """
    with shown(True) as show:
        yield show
