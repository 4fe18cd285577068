"""Records for the pure parts of the load test."""

from __future__ import annotations

from typing import Any

from serve.loadtest.records import RequestRecord


def record(
    model: str = "xiaoli",
    sent_s: float = 0.0,
    chunks_s: tuple[float, ...] = (0.2, 0.3, 0.4),
    done_s: float | None = None,
    **more: Any,
) -> RequestRecord:
    """A record of an answered request with a token per chunk."""
    more.setdefault("output_tokens", len(chunks_s))
    last = chunks_s[-1] if chunks_s else sent_s
    return RequestRecord(0, model, sent_s, chunks_s, last if done_s is None else done_s, **more)
