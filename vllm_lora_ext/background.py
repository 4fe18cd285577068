"""Threads that work beside somebody who must not wait."""

from __future__ import annotations

import contextlib
import os


def lower_priority() -> None:
    """Let this thread compute only where nobody else wants to (Linux counts priorities by thread)."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, 19)
