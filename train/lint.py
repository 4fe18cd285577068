"""What is worth a look in rows that can be trained on: pure, from rows and their token ids to findings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from train.prompts import CUT, END_ADDED, REWRITTEN, Example
from train.records import PLACEHOLDER
from train.rows import ASSISTANT, Row
from vllm_lora_ext.spec import Severity

_SHOWN = 5  # rows named per finding; the count says how many there are
# Less sure than {{name}}: an XML tag or a model's own token may look so, and it may be meant.
_LOOKS_UNFILLED = re.compile(rf"{PLACEHOLDER.pattern}|<[A-Z][A-Z_ ]{{2,}}>|\[(?:YOUR|INSERT)\b[^\]]*\]")


@dataclass(frozen=True)
class RowFinding:
    """What a rule says about `rows` (their places; none where it is about all): a code, and the fix."""

    code: str
    rows: tuple[str, ...]
    rule: str
    fix: str
    severity: Severity = Severity.WARNING

    def __str__(self) -> str:
        shown = ", ".join(self.rows[:_SHOWN]) + (", ..." if len(self.rows) > _SHOWN else "")
        count = f"{len(self.rows)} row{'s' * (len(self.rows) != 1)} ({shown}): " if self.rows else ""
        return f"{self.severity.value} [{self.code}] {count}{self.rule}. {self.fix}".rstrip()

    def as_dict(self) -> dict[str, Any]:
        """The finding as JSON has it."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "rows": list(self.rows),
            "rule": self.rule,
            "fix": self.fix,
        }


def lint(
    rows: Sequence[Row],
    examples: Sequence[Example],
    too_long: Sequence[Row],
    end: int,
    pad: int | None,
) -> list[RowFinding]:
    """Findings about rows and the examples made of them; warnings first.

    `rows` are those read, before any is repeated by a weight; `examples` those made of them, `too_long` the
    rows that were left out; `end` and `pad` are ids of the tokenizer.
    """
    findings = [*_about_texts(rows), *_about_examples(rows, examples, too_long, end)]
    if pad == end:
        findings.append(
            RowFinding(
                "pad-is-end",
                (),
                "the tokenizer pads with its end token",
                "Harmless here: what is padding goes by lengths, so end tokens are learned.",
                Severity.NOTE,
            )
        )
    return sorted(findings, key=lambda finding: finding.severity != Severity.WARNING)


def _about_texts(rows: Sequence[Row]) -> Iterable[RowFinding]:
    unfilled, empty = [], []
    for row in rows:
        if any(_LOOKS_UNFILLED.search(f"{turn.content}\n{turn.input or ''}") for turn in row.messages):
            unfilled.append(row.where)
        if any(turn.role == ASSISTANT and not turn.content.strip() for turn in row.messages):
            empty.append(row.where)
    copies, contradictions = _same_questions(rows)
    yield from _finding(
        "placeholder", unfilled, "what looks like a placeholder is left", "Fill it, if it is one."
    )
    yield from _finding("empty-answer", empty, "an answer is empty", "Write it, or remove the row.")
    yield from _finding(
        "duplicate",
        copies,
        "question and answer stand in an earlier row too, and may be both learned and held out",
        "Remove the copies; --data-weights says how often a file counts.",
    )
    yield from _finding(
        "contradiction",
        contradictions,
        "the same question has another answer in an earlier row",
        "Keep one, unless the model is meant to learn both.",
    )


def _same_questions(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """Places of rows whose question came before: with the same answer, and with another one."""
    copies, contradictions = [], []
    answers: defaultdict[object, set[str]] = defaultdict(set)
    for row in rows:
        known = answers[tuple((turn.role, turn.content, turn.input or "") for turn in row.messages[:-1])]
        if row.output in known:
            copies.append(row.where)
        elif known:
            contradictions.append(row.where)
        known.add(row.output)
    return copies, contradictions


def _about_examples(
    rows: Sequence[Row], examples: Sequence[Example], too_long: Sequence[Row], end: int
) -> Iterable[RowFinding]:
    dropped = [row.where for row in too_long]
    counts = Counter(example.where for example in examples)
    known = counts.keys() | dropped
    masked = [row.where for row in rows if row.where not in known]
    endless = [
        example.where
        for example in examples
        if any(example.input_ids[stop - 1] != end for _, stop in example.trained)
    ]
    yield from _finding("too-long", dropped, "longer than --max-length, and left out", "Raise --max-length.")
    yield from _finding("masked", masked, "no answer is trained", "Give an answer the weight 1.")
    yield from _finding("no-end", endless, "an answer does not end with the end token", "Encode it anew.")
    yield from _finding(
        "end-inside",
        _with(CUT, examples),
        "an answer holds the end token as text, and is cut there",
        "Remove it from the text: each answer gets its end token by itself.",
    )
    yield from _finding(
        "generation-prompt",
        _with(REWRITTEN, examples),
        "the chat template asks with another text than it puts in front of an answer",
        "The answer is trained behind what it asks with, as the server renders it. If that opens a thought, "
        "begin the answers with its end.",
    )
    yield from _finding(
        "end-added",
        _with(END_ADDED, examples),
        "the chat template does not end an answer with the tokenizer's end token, which was added",
        "Set eos_token to the token that ends a turn, if the server stops at it.",
        Severity.NOTE,
    )
    yield from _finding(
        "split-turns",
        [where for where, count in counts.items() if count > 1],
        "the chat template writes earlier turns differently than they were learned, so each of those "
        "answers became an example of its own",
        "",
        Severity.NOTE,
    )


def _with(quirk: str, examples: Sequence[Example]) -> list[str]:
    return [example.where for example in examples if quirk in example.quirks]


def _finding(
    code: str, places: Sequence[str], rule: str, fix: str, severity: Severity = Severity.WARNING
) -> Iterable[RowFinding]:
    if places:
        yield RowFinding(code, tuple(dict.fromkeys(places)), rule, fix, severity)
