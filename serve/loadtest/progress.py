"""What is shown while it runs, on stderr: a bar per stage, and the rates of the moment."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from serve.loadtest.records import RequestRecord

_REFRESH_S = 0.5
_LOG_EVERY_S = 20.0  # where stderr is a file


@contextmanager
def stage(name: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A bar of `total` steps; call what comes out after each."""
    with _bar(name, total, "", leave=False) as bar:

        def step() -> None:
            bar.update()

        yield step


@contextmanager
def load_stage(name: str, total: int | None) -> Iterator[Callable[[RequestRecord], None]]:
    """A bar of requests, with errors, and tokens and requests per second so far."""
    started = time.monotonic()
    done = errors = tokens = 0
    shown = 0.0
    with _bar(name, total, "req", leave=True) as bar:

        def on_record(record: RequestRecord) -> None:
            nonlocal done, errors, tokens, shown
            done += record.error is None
            errors += record.error is not None
            tokens += record.output_tokens
            bar.update()
            now = time.monotonic()
            if now - shown > _REFRESH_S:
                shown = now
                spent = max(1e-9, now - started)
                failed = f", {errors} failed" if errors else ""
                bar.set_postfix_str(
                    f"{done / spent:.1f} req/s, {tokens / spent:.0f} tok/s{failed}", refresh=False
                )

        yield on_record


def _bar(name: str, total: int | None, unit: str, leave: bool) -> tqdm[Any]:
    every = 0.1 if sys.stderr.isatty() else _LOG_EVERY_S
    return tqdm(total=total, desc=name, unit=unit, file=sys.stderr, leave=leave, mininterval=every)


def tell(line: str) -> None:
    """A line for people, above the bars."""
    tqdm.write(line, file=sys.stderr)
