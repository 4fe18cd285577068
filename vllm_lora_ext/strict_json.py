"""JSON as the standard has it: no duplicate keys, no NaN, no nesting or numbers without end."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

_MAX_DEPTH = 64  # no honest config nests deeper, and json.loads recurses
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON writes it; two of them are one character


class JsonRefused(ValueError):
    """Not the JSON object that it should be; `code` is the finding's code."""

    def __init__(self, code: str, rule: str) -> None:
        self.code, self.rule = code, rule
        super().__init__(rule)


Pairs = list[tuple[str, Any]]


def parse_object(
    data: bytes, max_depth: int = _MAX_DEPTH, make: Callable[[Pairs], Any] | None = None
) -> dict[str, Any]:
    """The object that `data` (UTF-8) holds; `max_depth` 0 leaves nesting to Python's own limit.

    `make` builds what stands for an object inside, by default a dict (`without_duplicates`).

    Raises:
        JsonRefused: with code not_json, duplicate_key, not_finite or not_object.
    """
    try:
        body = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=make or without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if _HALF_CHARACTER.search(data):
            json.dumps(body, ensure_ascii=False).encode()  # a half is taken by no file and no socket
    except JsonRefused:
        raise
    except UnicodeEncodeError as error:
        raise JsonRefused("not_json", "holds half a character (a lone surrogate)") from error
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


def without_duplicates(pairs: Pairs) -> dict[str, Any]:
    """The dict of an object's pairs.

    Raises:
        JsonRefused: a key stands there twice.
    """
    body = dict(pairs)
    if len(body) < len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonRefused("duplicate_key", f"has the key {key[:60]!r} twice")
    return body


def _refuse_constant(text: str) -> Any:
    raise JsonRefused("not_finite", f"holds {text}, which is no number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 is a number in JSON, and none that can be written again
        _refuse_constant(text[:20])
    return number


def _is_deeper(body: Any, depth: int) -> bool:
    level = [body]
    for _ in range(depth):
        if not level:
            return False
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
    return bool(level)


def plain_number(value: float) -> float:
    """16 for 16.0: numbers that are equal are written alike."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def canonical(body: Any) -> bytes:
    """The one way that we write a value, so that equal values have equal digests."""
    return (json.dumps(body, sort_keys=True, ensure_ascii=False, indent=1) + "\n").encode()
