"""Exit codes, so that a pipeline knows what to do without reading messages.

| code | meaning |
|---|---|
| 0 | ok |
| 1 | internal error: ours, or of a user's module; a traceback is printed |
| 2 | usage or configuration |
| 3 | data: invalid, damaged, missing |
| 4 | does not fit: memory, device or disk |
| 5 | an optional dependency is missing |
| 75 | try again (EX_TEMPFAIL): whatever raised a `TryAgain`, from a stop with a checkpoint to a lost node |
| 130 | interrupted |
| 137 | killed (SIGKILL), as the kernel does where a container has no memory left; no error of ours ends so |
"""

import os
from contextlib import suppress
from pathlib import Path

from penstock.storage.errors import DataError, DoesNotFit, TryAgain, is_ours
from penstock.storage.redaction import redact_text

_TERMINATION_LOG = "/dev/termination-log"
_TERMINATION_BYTES = 4096

OK, INTERNAL, USAGE, DATA, DOES_NOT_FIT, MISSING, RETRY, INTERRUPTED = 0, 1, 2, 3, 4, 5, 75, 130
KILLED = 137


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends the process with."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    for kind, code in (
        (TryAgain, RETRY),
        (DataError, DATA),
        (DoesNotFit, DOES_NOT_FIT),
        (ImportError, MISSING),
        (ValueError, USAGE),
    ):
        if isinstance(error, kind) and (kind is not ValueError or is_ours(error)):
            return code
    return INTERNAL


def write_termination_log(error: BaseException, code: int) -> None:
    """Tell Kubernetes why this process ends, in the 4 KiB that it keeps; nothing elsewhere.

    The file is PENSTOCK_TERMINATION_LOG, or in a pod /dev/termination-log. Never an error: there is one already.
    """
    path = os.environ.get("PENSTOCK_TERMINATION_LOG")
    if path is None and "KUBERNETES_SERVICE_HOST" in os.environ and Path(_TERMINATION_LOG).exists():
        path = _TERMINATION_LOG
    if path:
        reason = redact_text(f"penstock: exit code {code}: {type(error).__name__}: {error}").encode()
        with suppress(OSError):
            Path(path).write_bytes(reason[:_TERMINATION_BYTES].decode(errors="ignore").encode())
