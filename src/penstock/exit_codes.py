"""Exit codes, so that a pipeline knows what to do without reading messages.

| code | meaning |
|---|---|
| 0 | ok |
| 1 | internal error: ours; a traceback is printed |
| 2 | usage or configuration |
| 3 | data: invalid, damaged, missing |
| 4 | does not fit: memory, device or disk |
| 5 | an optional dependency is missing |
| 75 | try again: stopped with a checkpoint (EX_TEMPFAIL) |
| 130 | interrupted |
"""

from penstock.storage.errors import DataError, DoesNotFit

OK, INTERNAL, USAGE, DATA, DOES_NOT_FIT, MISSING, RETRY, INTERRUPTED = 0, 1, 2, 3, 4, 5, 75, 130


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends the process with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if type(error).__name__ == "Stopped":  # engine.trainer's; importing it would load torch for every usage error
        return RETRY
    for kind, code in ((DataError, DATA), (DoesNotFit, DOES_NOT_FIT), (ImportError, MISSING), (ValueError, USAGE)):
        if isinstance(error, kind):
            return code
    return INTERNAL
