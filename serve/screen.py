"""What people read: tables and lines on the terminal, wide enough to be whole in a log file."""

from __future__ import annotations

import sys

from rich.console import Console

_LOG_WIDTH = 140  # columns where the output is no terminal


def screen(stderr: bool = True) -> Console:
    """stderr, unless the output is the data that was asked for."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _LOG_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False)
