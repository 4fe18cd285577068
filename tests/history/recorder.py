"""What happened, one line of JSON for each event, written as it happens; times are `time.monotonic`.

Kinds of lines: `base` (what the base says to a prompt), `version` (the two words of a version), `sent` and
`ended` (a request), `change` (what an operator did to a name), `state` (what the server says of a name
when it starts), `outage` (from the kill to ready again) and `rest` (what still runs after the last).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def now() -> float:
    """The time of events."""
    return time.monotonic()


class Recorder:
    """Writes events to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._requests = 0

    def write(self, kind: str, **fields: Any) -> None:
        """One event."""
        self._file.write(json.dumps({"kind": kind, **fields}, ensure_ascii=False) + "\n")
        self._file.flush()

    def number(self) -> int:
        """Of a new request."""
        self._requests += 1
        return self._requests

    def close(self) -> None:
        """The end."""
        self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a file."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
