"""A record becomes a row: which of its fields are question, answer and turns, and whether they can be used.

    {"instruction", "input", "output"}   a question in two parts (`input` may be absent), and its answer
    {"input", "target"}                  question and answer
    {"prompt", "completion"}             two texts, or two lists of turns
    {"messages"}                         turns of role and content
    {"conversations"}                    turns of from and value

Any of them may have a `system` message. `--columns` says it where the names are others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from train.formats import Record, load_json
from train.rows import ASSISTANT, SYSTEM, USER, Message, Row
from vllm_lora_ext.errors import BadData, BadSetting

PARTS = ("instruction", "input", "output", "system", "messages")
# {{name}} as templates have it, <NAME> and <AUTHOR> as identity rows in circulation have it.
PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}|<(?:NAME|AUTHOR)>")
_TURNS = ("messages", "conversations")
_ROLES = {
    **dict.fromkeys((SYSTEM, "developer"), SYSTEM),
    **dict.fromkeys((USER, "human"), USER),
    **dict.fromkeys((ASSISTANT, "gpt", "model"), ASSISTANT),
}
_TOOL_ROLES = ("tool", "function", "function_call", "observation")
_EXAMPLE = 'Write {"instruction": "...", "input": "", "output": "..."}.'


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """`--columns` as part -> column.

    Raises:
        BadSetting: one is not PART=COLUMN, names an unknown part, or a part twice.
    """
    parsed: dict[str, str] = {}
    for text in columns:
        part, _, column = text.partition("=")
        if part not in PARTS or not column or part in parsed:
            rule = f"`{part}` is there twice" if part in parsed else "must be PART=COLUMN"
            raise BadSetting(f"--columns {text}", rule, f"Parts are {', '.join(PARTS)}.")
        parsed[part] = column
    if "messages" in parsed and set(parsed) - {"messages", "system"}:
        raise BadSetting("--columns", "`messages` is a whole conversation", "Leave out the other parts.")
    return parsed


def row_of(record: Record, columns: Mapping[str, str], source: int = 0) -> Row:
    """The row of a record; `columns` as `parse_columns` gives them, `source` the file's position in --data.

    Raises:
        BadData: a part is missing, empty or no text, a placeholder is left, the last turn is no answer.
    """
    where, fields = record.where, record.value
    if not isinstance(fields, dict):
        raise BadData(where, f"must be an object, is a {type(fields).__name__}", _EXAMPLE)
    turns = _turns_of(fields, columns, where)
    system = fields.get(columns.get("system", "system"))
    if system and not any(turn.role == SYSTEM for turn in turns):
        turns = [Message(SYSTEM, _text(system, "`system`", where)), *turns]
    _check_order(turns, where)
    for turn in turns:
        if found := PLACEHOLDER.search(f"{turn.content}\n{turn.input or ''}"):
            rule = f"holds {found[0]}, a placeholder that the model would learn to say"
            raise BadData(where, rule, "Replace it by what the identity should say.")
    return Row(tuple(turns), where, source)


def _turns_of(fields: Mapping[str, Any], columns: Mapping[str, str], where: str) -> list[Message]:
    """The record's turns, by the first layout that its fields fit."""
    if "messages" in columns:
        key = columns["messages"]
        return _parse_turns(_field(fields, key, where), key, where)
    if columns.keys() & {"instruction", "input", "output"}:
        if "instruction" in columns or "instruction" in fields:
            return _instruction(fields, columns, where)
        return _pair(fields, columns.get("input", "input"), columns.get("output", "output"), where)
    for key in _TURNS:
        if fields.get(key) is not None:
            return _parse_turns(fields[key], key, where)
    if "instruction" not in fields:
        for question, answer in (("prompt", "completion"), ("input", "target")):
            if question in fields and answer in fields:
                return _pair(fields, question, answer, where)
    return _instruction(fields, columns, where)


def _instruction(fields: Mapping[str, Any], columns: Mapping[str, str], where: str) -> list[Message]:
    names = {part: columns.get(part, part) for part in ("instruction", "input", "output")}
    question, answer = (
        _text(_field(fields, names[part], where), f"`{names[part]}`", where)
        for part in ("instruction", "output")
    )
    extra = fields.get(names["input"])
    extra = _text(extra, f"`{names['input']}`", where) if extra else ""
    if not answer.strip():
        raise BadData(where, f"`{names['output']}` is empty", "Write the answer, or remove the row.")
    if not (question + extra).strip():
        raise BadData(where, f"`{names['instruction']}` is empty", "Write the question, or remove the row.")
    return [Message(USER, question, extra), Message(ASSISTANT, answer)]


def _pair(fields: Mapping[str, Any], question: str, answer: str, where: str) -> list[Message]:
    """Question and answer, each a text or a list of turns."""
    turns: list[Message] = []
    for key, role in ((question, USER), (answer, ASSISTANT)):
        value = _field(fields, key, where)
        if isinstance(value, list):
            turns += _parse_turns(value, key, where)
        else:
            turns.append(Message(role, _filled(value, f"`{key}`", where)))
    return turns


def _parse_turns(value: object, key: str, where: str) -> list[Message]:
    if isinstance(value, str):  # a column of a CSV file
        try:
            value = load_json(value)
        except (ValueError, RecursionError):
            raise BadData(where, f"`{key}` is a text that is no JSON", "Write a list of turns.") from None
    if not isinstance(value, list) or not value:
        rule = f"`{key}` must be a list of turns, is {'empty' if value == [] else type(value).__name__}"
        raise BadData(where, rule, 'Write [{"role": "user", "content": "..."}, ...].')
    return [_parse_turn(turn, f"turn {number} of `{key}`", where) for number, turn in enumerate(value, 1)]


def _parse_turn(turn: object, name: str, where: str) -> Message:
    if not isinstance(turn, dict):
        rule = f"{name} must be an object, is a {type(turn).__name__}"
        raise BadData(where, rule, 'Write {"role": "user", "content": "..."}.')
    stated = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    if stated in _TOOL_ROLES or any(turn.get(key) for key in ("tool_calls", "function_call")):
        rule = f"{name} calls a tool or answers for one, which is not trained on here"
        raise BadData(where, rule, "Remove the row, or train it as plain text.")
    role = _ROLES.get(stated) if isinstance(stated, str) else None
    if role is None:
        raise BadData(where, f"{name} has the role {stated!r}", f"Roles are {', '.join(_ROLES)}.")
    content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
    if isinstance(content, list):
        content = _joined_parts(content, name, where)
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise BadData(where, f"{name} has the weight {weight!r}", "Write 1 (trained) or 0 (only read).")
    return Message(role, _filled(content, name, where), trained=weight is None or bool(weight))


def _joined_parts(parts: list[Any], name: str, where: str) -> str:
    """The texts of a turn in parts, joined as vLLM joins them for a template that takes texts."""
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise BadData(where, f"{name} has a part that is no text", "Only text can be trained on.")
    return "\n".join(map(str, texts))


def _check_order(turns: Sequence[Message], where: str) -> None:
    spoken = [turn.role for turn in turns if turn.role != SYSTEM]
    if not spoken or turns[-1].role != ASSISTANT:
        rule = "must end with the assistant's turn, which is what is learned"
        raise BadData(where, rule, "Add the answer, or remove the row.")
    if spoken[0] != USER:
        raise BadData(where, "must begin with the user's turn", "Add the question, or remove the answer.")


def _field(fields: Mapping[str, Any], key: str, where: str) -> Any:
    value = fields.get(key)
    if value is None:
        names = ", ".join(str(name)[:40] for name in list(fields)[:20]) or "nothing"
        fix = "Say which column is which, as in --columns instruction=question output=answer."
        raise BadData(where, f"has no `{key}`, has {names}", fix)
    return value


def _filled(value: object, name: str, where: str) -> str:
    text = _text(value, name, where)
    if not text.strip():
        raise BadData(where, f"{name} is empty", "Fill it, or remove the row.")
    return text


def _text(value: object, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadData(where, f"{name} must be text, is a {type(value).__name__}", "Put it in quotes.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadData(where, f"{name} holds half a character (a lone surrogate)", "Write it anew.")
    if "\0" in value:
        raise BadData(where, f"{name} holds a NUL character", "Remove it.")
    return value
