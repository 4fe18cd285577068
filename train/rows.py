"""A row is a conversation that ends with an answer; rows are split, weighed and given a system message."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant.

    `input` is the second half of an instruction, which the prompt form joins to `content`; None where the
    turn is one text. An answer that is not `trained` is read by the model but carries no loss.
    """

    role: str
    content: str
    input: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class Row:
    """A conversation whose last turn is the assistant's.

    `where` is the file with the row's or line's number, from 1, for messages; `source` is the position of
    the row's file in `--data`, from 0.
    """

    messages: tuple[Message, ...]
    where: str
    source: int = 0

    @classmethod
    def of(cls, instruction: str, input: str, output: str, where: str) -> Row:  # noqa: A002  as rows have it
        """A row of one question and one answer."""
        return cls((Message(USER, instruction, input), Message(ASSISTANT, output)), where)

    @property
    def output(self) -> str:
        """The last answer."""
        return self.messages[-1].content


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out, the same for the same seed; at least one stays to train on."""
    held = min(round(len(rows) * share), len(rows) - 1)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen = set(order[:held])
    training = [row for i, row in enumerate(rows) if i not in chosen]
    return training, [rows[i] for i in sorted(chosen)]


def weigh_rows(rows: Sequence[Row], weights: Sequence[float], seed: int) -> list[Row]:
    """Each row as often as its file is seen per epoch; `weights` has one number per file, or none at all.

    2 is twice, 0.5 a half of the file's rows that the seed chooses (at least one row). Weigh after
    splitting: a copy of a row that is trained on must not be held out.
    """
    if not weights:
        return list(rows)
    times = [0] * len(rows)
    for source, weight in enumerate(weights):
        places = [i for i, row in enumerate(rows) if row.source == source]
        if not places:
            continue
        wanted = max(1, round(len(places) * weight))
        whole, rest = divmod(wanted, len(places))
        extra = set(random.Random(f"{seed} {source}").sample(places, rest))
        for i in places:
            times[i] = whole + (i in extra)
    return [row for row, count in zip(rows, times, strict=True) for _ in range(count)]


def with_system(rows: Sequence[Row], system: str | None) -> list[Row]:
    """The rows, with a system message in front of those that have none; None changes nothing."""
    if system is None:
        return list(rows)
    message = Message(SYSTEM, system)
    return [
        row
        if any(turn.role == SYSTEM for turn in row.messages)
        else dataclasses.replace(row, messages=(message, *row.messages))
        for row in rows
    ]
