"""Prompts from files: conversations (JSONL), and recorded traces (JSONL or CSV) with times and lengths.

Conversations are `{"messages": [...]}` as OpenAI's, `{"conversations": [...]}` as ShareGPT's, or
`{"prompt": "..."}`. Trace rows are Mooncake's (`timestamp` in milliseconds, `input_length`,
`output_length`), BurstGPT's (`Timestamp` in seconds, `Request tokens`, `Response tokens`), or our own
`requests.csv`, so that a run can be asked again. A row may name its `model`.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.loadtest.workload import Message, Prompt
from vllm_lora_ext.errors import BadData

_MOST_TOKENS = 10_000_000
_LONGEST_S = 1e10  # traces may count from 1970
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
}
# column of the time -> (seconds per unit, column of input tokens, of output tokens)
_TRACE_FORMS = {
    "due_s": (1.0, "prompt_tokens", "output_tokens"),
    "sent_s": (1.0, "prompt_tokens", "output_tokens"),
    "timestamp": (1e-3, "input_length", "output_length"),
    "Timestamp": (1.0, "Request tokens", "Response tokens"),
}


def read_conversations(path: Path) -> list[Prompt]:
    """The prompts of a JSONL file: each conversation up to its last user turn.

    Raises:
        BadData: not there, not JSONL, a row without a question.
    """
    return [_conversation(path, line, row) for line, row in _json_lines(path)]


def read_trace(path: Path, speed: float) -> list[Prompt]:
    """The prompts of a trace, in order of time from 0, `speed` times as fast.

    Raises:
        BadData: not there, no row, a row without time or lengths.
    """
    rows = list(_csv_lines(path) if path.suffix.lower() == ".csv" else _json_lines(path))
    rows = [(line, row) for line, row in rows if row.get("phase") != "warmup"]
    if len(runs := {row["run"] for _, row in rows if "run" in row}) > 1:
        rule = f"holds {len(runs)} runs ({', '.join(sorted(map(str, runs))[:4])})"
        raise BadData(str(path), rule, "Keep the lines of one.")
    if not rows:
        raise BadData(str(path), "holds no request")
    prompts = sorted((_traced(path, line, row) for line, row in rows), key=lambda prompt: prompt.due_s or 0.0)
    start = prompts[0].due_s or 0.0
    return [replace(prompt, due_s=((prompt.due_s or 0.0) - start) / speed) for prompt in prompts]


def _conversation(path: Path, line: int, row: Mapping[str, Any]) -> Prompt:
    turns = row.get("messages") or row.get("conversations")
    if isinstance(row.get("prompt"), str):
        turns = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(turns, list):
        raise BadData(f"{path}, line {line}", "has neither messages, conversations nor a prompt")
    messages: list[Message] = []
    for turn in turns:
        role = _ROLES.get(str(turn.get("role") or turn.get("from"))) if isinstance(turn, dict) else None
        text = _text_of(turn) if role else None
        if role is None or text is None:
            raise BadData(
                f"{path}, line {line}", "a turn has no role of user, assistant or system, or no text"
            )
        messages.append({"role": role, "content": text})
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise BadData(f"{path}, line {line}", "no turn of a user to be answered")
    output = row.get("output_length") or row.get("max_tokens")
    model = row.get("model")
    return Prompt(
        tuple(messages),
        output_tokens=_tokens(output, f"{path}, line {line}") if output else None,
        model=str(model) if model else None,
    )


def _text_of(turn: Mapping[str, Any]) -> str | None:
    """A turn's text; of OpenAI's content parts those that are text."""
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        ]
        content = "".join(part for part in parts if isinstance(part, str)) or None
    return content if isinstance(content, str) else None


def _tokens(value: Any, item: str) -> int:
    """A count of tokens as a file has it.

    Raises:
        BadData: it is none.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 1 <= number <= _MOST_TOKENS or number % 1:
        raise BadData(item, f"{str(value)[:40]!r} is no number of tokens", f"Write 1 to {_MOST_TOKENS}.")
    return int(number)


def _traced(path: Path, line: int, row: Mapping[str, Any]) -> Prompt:
    for column, (unit_s, input_column, output_column) in _TRACE_FORMS.items():
        if row.get(column) in (None, ""):
            continue
        try:
            due_s = float(row[column]) * unit_s
        except (TypeError, ValueError):
            due_s = math.nan
        if not 0 <= due_s <= _LONGEST_S:
            raise BadData(f"{path}, line {line}", f"{column} is no time, it is {str(row[column])[:40]!r}")
        input_tokens, output_tokens = (
            _tokens(row.get(name), f"{path}, line {line}, {name}") for name in (input_column, output_column)
        )
        model = row.get("model")
        return Prompt(None, input_tokens, output_tokens, str(model) if model else None, due_s)
    columns = ", ".join(_TRACE_FORMS)
    raise BadData(f"{path}, line {line}", "has no time", f"A trace has one of the columns {columns}.")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for number, text in _lines(path):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadData(
                f"{path}, line {number}", f"is not JSON ({error})", "One JSON object a line."
            ) from error
        if not isinstance(row, dict):
            raise BadData(f"{path}, line {number}", "is not a JSON object", "One JSON object a line.")
        yield number, row
    if not number:
        raise BadData(str(path), "holds no row")


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = list(csv.DictReader(text for _, text in _lines(path)))
    except csv.Error as error:
        raise BadData(str(path), f"is no CSV ({error})") from error
    if not rows:
        raise BadData(str(path), "holds no row")
    yield from enumerate(rows, start=2)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadData(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadData(str(path), "is not text in UTF-8") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
