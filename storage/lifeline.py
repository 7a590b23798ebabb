"""Let a process that we start end when we do, however we end."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, or end it now where that has happened already.

    The kernel goes by the thread that started this process, which has to live as long as the work. Elsewhere than on
    Linux only what has happened already counts.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # nobody is there to be told
