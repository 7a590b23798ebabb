"""Functions of ours in processes of their own: fresh interpreters with this one's `sys.path`.

Not by `multiprocessing`: that would run the user's script again in each of them, which ends badly where the script has
no `if __name__ == "__main__"`.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe

_CODE = "import sys; handle, parent, *sys.path = sys.argv[1:]; from penstock.storage.children import main; "
_CODE += "main(int(handle), int(parent))"


def start_child(
    work: Callable[..., object], *args: object, environment: Mapping[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Connection]:
    """Have another process call `work`, a function of a module, with a connection to this one, this one's id, and what
    else is given, all of which is pickled. The end of either process closes the connection.
    """
    ours, theirs = Pipe()
    with theirs:
        handle = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", _CODE, str(handle), str(os.getpid()), *map(str, sys.path)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # our stdout is for results
            pass_fds=[handle],
            env=environment,
        )
    with suppress(OSError):  # it died at once; whoever waits for it will see
        ours.send_bytes(pickle.dumps((work, args)))
    return process, ours


def main(handle: int, parent: int) -> None:
    """Be a child; it ignores SIGINT: whoever sends that to a whole group means the parent, which ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(handle, False)
    with Connection(handle) as connection:
        work, args = pickle.loads(connection.recv_bytes())
        work(connection, parent, *args)
