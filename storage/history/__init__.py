"""Histories: rows that chunks of full-graph training leave for each other, and gradients that they send back.

`tables` says what is fresh, past and too old; `layout` where the rows of each pair of chunks lie; `store` keeps them in
memory or in a mapped file. `tableset` decides which table lies where, within a budget, and owns them.
Everything here is scratch: it is deleted when its set is closed, and checkpoints take copies.
"""

from penstock.storage.history.tables import MessageTable, RowStore, RunTable, StaleRead
from penstock.storage.history.tableset import HistoryConfig, HistorySet, open_history

__all__ = ["HistoryConfig", "HistorySet", "MessageTable", "RowStore", "RunTable", "StaleRead", "open_history"]
