"""Threads that work beside somebody who must not wait."""

from __future__ import annotations

import contextlib
import os


def lower_priority(nice: int = 19) -> None:
    """Let this thread compute only where nobody else wants to (Linux counts priorities by thread).

    With a smaller `nice` it gets a share of a busy core: 5 % at 13, 10 % at 10, 25 % at 5.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
