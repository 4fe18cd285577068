"""The table of docs/adapter-support.md: written from what the tests found, and compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.train.peft_zoo import KINDS, RANK

_HEAD = (
    "| adapter | conversion | rank it takes | left out otherwise | base needed |",
    "|---|---|---|---|---|",
)


@dataclass(frozen=True)
class Found:
    """Of one adapter on one base: exact, closest or refused; how or why; largest rank and error."""

    outcome: str
    how: str
    rank: int = 0
    error: float = 0.0


def rows_of(found: Mapping[str, Sequence[Found]]) -> list[str]:
    return [_row(kind.title, kind.rank, kind.needs_base, found[kind.title]) for kind in KINDS]


def _row(title: str, rank: str, needs_base: bool, results: Sequence[Found]) -> str:
    outcomes = sorted({one.outcome for one in results})
    served = [one for one in results if one.outcome != "refused"]
    if not served:
        return f"| {title} | refused | | | |"
    said = {"exact": "exact", "closest": f"closest of rank {RANK}"}[served[0].outcome]
    if "refused" in outcomes:
        said += "; refused where the module has a bias"
    worst = max(one.error for one in served)
    lost = "nothing" if served[0].outcome == "exact" else f"{worst:.0%}"
    largest = rank or "full"
    return f"| {title} | {said} | {largest} | {lost} | {'yes' if needs_base else 'no'} |"


def table_in(document: Path) -> list[str]:
    """The rows that stand there now."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start = lines.index(_HEAD[0]) + 2
    return [line for line in lines[start : start + len(KINDS)] if line.startswith("|")]


def write_table(document: Path, rows: Sequence[str]) -> None:
    """Put them in the place of those."""
    lines = document.read_text(encoding="utf-8").splitlines()
    start = lines.index(_HEAD[0]) + 2
    end = start
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    document.write_text("\n".join([*lines[:start], *rows, *lines[end:]]) + "\n", encoding="utf-8")
