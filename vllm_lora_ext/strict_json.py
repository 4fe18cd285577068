"""JSON as the standard has it: no duplicate keys, no NaN, no nesting or numbers without end."""

from __future__ import annotations

import json
from typing import Any

_MAX_DEPTH = 64  # no honest config nests deeper, and json.loads recurses


class JsonRefused(ValueError):
    """Not the JSON object that it should be; `code` is the finding's code."""

    def __init__(self, code: str, rule: str) -> None:
        self.code, self.rule = code, rule
        super().__init__(rule)


def parse_object(data: bytes, max_depth: int = _MAX_DEPTH) -> dict[str, Any]:
    """The object that `data` (UTF-8) holds; `max_depth` 0 leaves nesting to Python's own limit.

    Raises:
        JsonRefused: with code not_json, duplicate_key, not_finite or not_object.
    """
    try:
        body = json.loads(
            data.decode("utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except JsonRefused:
        raise
    except UnicodeDecodeError as error:
        raise JsonRefused("not_json", f"is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise JsonRefused("not_json", f"cannot be read as JSON ({reason})") from error
    if not isinstance(body, dict):
        raise JsonRefused("not_object", f"must hold an object, holds a {type(body).__name__}")
    if max_depth and _is_deeper(body, max_depth):
        raise JsonRefused("not_json", f"is nested deeper than {max_depth} levels")
    return body


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonRefused("duplicate_key", f"has the key {key[:60]!r} twice")
    return body


def _refuse_constant(text: str) -> Any:
    raise JsonRefused("not_finite", f"holds {text}, which is no number in JSON")


def _is_deeper(value: Any, depth: int) -> bool:
    if isinstance(value, dict):
        return depth == 0 or any(_is_deeper(item, depth - 1) for item in value.values())
    if isinstance(value, list):
        return depth == 0 or any(_is_deeper(item, depth - 1) for item in value)
    return False


def canonical(body: Any) -> bytes:
    """The one way that we write a value, so that equal values have equal digests."""
    return (json.dumps(body, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()
