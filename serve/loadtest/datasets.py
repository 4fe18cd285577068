"""Prompts from files: conversations (JSONL), and recorded traces (JSONL or CSV) with times and lengths.

Conversations are `{"messages": [...]}` as OpenAI's, `{"conversations": [...]}` as ShareGPT's, or
`{"prompt": "..."}`. Trace rows are Mooncake's (`timestamp` in milliseconds, `input_length`,
`output_length`), BurstGPT's (`Timestamp` in seconds, `Request tokens`, `Response tokens`), or our own
`requests.csv`, so that a run can be asked again. A row may name its `model`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from serve.loadtest.workload import Message, Prompt
from vllm_lora_ext.errors import BadData

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
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
    rows = list(_csv_lines(path) if path.suffix == ".csv" else _json_lines(path))
    rows = [(line, row) for line, row in rows if row.get("phase") != "warmup"]
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
        text = (turn.get("content") or turn.get("value")) if role else None
        if role is None or not isinstance(text, str):
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
        tuple(messages), output_tokens=int(output) if output else None, model=str(model) if model else None
    )


def _traced(path: Path, line: int, row: Mapping[str, Any]) -> Prompt:
    for column, (unit_s, input_column, output_column) in _TRACE_FORMS.items():
        if row.get(column) in (None, ""):
            continue
        try:
            due_s = float(row[column]) * unit_s
            input_tokens, output_tokens = (
                max(1, int(float(row[name]))) for name in (input_column, output_column)
            )
        except (KeyError, TypeError, ValueError) as error:
            rule = f"{column} needs numbers in {input_column} and {output_column} beside it"
            raise BadData(f"{path}, line {line}", rule) from error
        model = row.get("model")
        return Prompt(None, input_tokens, output_tokens, str(model) if model else None, due_s)
    columns = ", ".join(_TRACE_FORMS)
    raise BadData(f"{path}, line {line}", "has no time", f"A trace has one of the columns {columns}.")


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for number, text in _lines(path):
        try:
            row = json.loads(text)
        except ValueError as error:
            raise BadData(
                f"{path}, line {number}", f"is not JSON ({error})", "One JSON object a line."
            ) from error
        if not isinstance(row, dict):
            raise BadData(f"{path}, line {number}", "is not a JSON object", "One JSON object a line.")
        yield number, row
    if not number:
        raise BadData(str(path), "holds no row")


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = list(csv.DictReader(text for _, text in _lines(path)))
    if not rows:
        raise BadData(str(path), "holds no row")
    yield from enumerate(rows, start=2)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadData(str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadData(str(path), "is not text in UTF-8") from error
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
