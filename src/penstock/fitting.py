"""Lines and tables that fit a terminal: what matters least goes first, and nothing is cut in the middle."""

from collections.abc import Sequence

_BETWEEN = "  "


def fit_pieces(pieces: Sequence[tuple[int, str]], width: int | None) -> str:
    """Join texts that are not empty, each with its rank (0 matters most), in their order; those of the highest rank are
    left out until the line has no more than `width` characters. Rank 0 always stays; `width` None fits all."""
    kept = [piece for piece in pieces if piece[1]]
    while width is not None and len(_BETWEEN.join(text for _, text in kept)) > width:
        last = max((rank for rank, _ in kept), default=0)
        if last == 0:
            break
        at = max(n for n, (rank, _) in enumerate(kept) if rank == last)
        del kept[at]
    return _BETWEEN.join(text for _, text in kept)


def fit_columns(
    headings: Sequence[str], rows: Sequence[Sequence[str]], ranks: Sequence[int], width: int | None, padding: int
) -> list[int]:
    """Which columns of a table fit `width` characters, in their order, with `padding` characters beside each.

    `ranks` say by column what it matters, see `fit_pieces`. Columns without any text are left out at any width.
    """
    filled = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    widths = [max(len(row[n]) for row in (headings, *rows)) + padding for n in range(len(headings))]
    kept = sorted(filled, key=lambda n: (ranks[n], n))
    while width is not None and sum(widths[n] for n in kept) > width and kept and ranks[kept[-1]] > 0:
        kept.pop()
    return sorted(kept)
