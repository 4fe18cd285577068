"""How much is done, counted in calls: the same on a busy machine, where seconds are not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class Work:
    """Calls made by this thread within the block, of functions written in Python and in C."""

    def __init__(self) -> None:
        self.calls = 0
        self._outer: Callable[..., Any] | None = None

    def __enter__(self) -> Work:
        self._outer = sys.getprofile()
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._outer)

    def _count(self, frame: FrameType, event: str, arg: Any) -> None:
        self.calls += event in ("call", "c_call")
