"""Rows of instruction, input and output, as users have them, read and checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.rows import Row, split_rows
from vllm_lora_ext.errors import BadData

__all__ = ["Row", "digest_of", "read_rows", "split_rows"]

_PLACEHOLDER = re.compile(r"\{\{\s*\w+\s*\}\}")
_SHOWN = 5  # bad rows named per message; the count says how many there are


def read_rows(paths: Sequence[str]) -> list[Row]:
    """All rows of all files, in order.

    Raises:
        BadData: a file is missing, empty or no JSON array of objects; a row
            lacks `instruction` or `output`, or still holds a `{{placeholder}}`.
    """
    rows = [row for path in paths for row in _read_file(Path(path))]
    unfilled = [
        (row, found[0])
        for row in rows
        if (found := _PLACEHOLDER.findall("\n".join(f"{m.content}\n{m.input}" for m in row.messages)))
    ]
    if unfilled:
        shown = "; ".join(f"{row.where} holds {text}" for row, text in unfilled[:_SHOWN])
        raise BadData(
            shown,
            f"{len(unfilled)} of {len(rows)} rows still hold a placeholder, "
            "and the model would learn to say it",
            "Replace each one by what the identity should say.",
        )
    return rows


def digest_of(paths: Sequence[str]) -> str:
    """SHA-256 over the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise BadData(str(path), "no such file", "Check --data.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        body = json.loads(text) if text.strip() else []
    except (OSError, ValueError, RecursionError) as error:
        raise BadData(
            str(path), f"cannot be read as JSON ({error})", "Give a JSON array of objects."
        ) from error
    if not isinstance(body, list):
        raise BadData(
            str(path),
            f"must hold a JSON array of objects, holds a {type(body).__name__}",
            'Write [{"instruction": "...", "input": "", "output": "..."}, ...].',
        )
    if not body:
        raise BadData(str(path), "holds no row", "Add rows of instruction, input and output.")
    return [_read_row(row, f"{path} row {number}") for number, row in enumerate(body, start=1)]


def _read_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        rule = f"must be an object, is a {type(row).__name__}"
        raise BadData(where, rule, 'Write {"instruction": "...", "input": "", "output": "..."}.')
    instruction, output = (_text(row, key, where) for key in ("instruction", "output"))
    extra = _text(row, "input", where) if row.get("input") else ""
    if not output.strip():
        raise BadData(where, "`output` is empty", "Write the answer, or remove the row.")
    if not (instruction + extra).strip():
        raise BadData(where, "`instruction` is empty", "Write the question, or remove the row.")
    return Row.of(instruction, extra, output, where)


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if value is None:
        raise BadData(where, f"has no `{key}`", f"Add it, or remove the row; it has {list(row)}.")
    if not isinstance(value, str):
        raise BadData(where, f"`{key}` must be text, is a {type(value).__name__}", "Put it in quotes.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadData(where, f"`{key}` holds half a character (a lone surrogate)", "Write it anew.")
    return value
