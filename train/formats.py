"""A file of rows becomes records: JSON, JSON lines and CSV, read by Python's own modules.

A record that cannot be read comes out as the error that names its line, so that one bad line is counted
and the rest is read all the same.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vllm_lora_ext.errors import BadData

_SPACE = re.compile(r"[ \t\n\r]*")
_NOT_UTF8 = re.compile(r"[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8
_ROW = 'Write {"instruction": "...", "input": "", "output": "..."}.'
_MAX_NULS = 0.05  # share of a file's first bytes; text has none, UTF-16 and binary files many


@dataclass(frozen=True)
class Record:
    """One record as it stands in a file; `where` is the file with the row's or line's number, from 1."""

    value: object
    where: str


Found = Record | BadData
TEXT_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")


def read_file(path: Path) -> Iterator[Found]:
    """The records of a JSON array, of JSON lines or of a CSV file, in order, told apart by the file's suffix.

    A `.json` file that holds one object per line is read as such.

    Raises:
        BadData: the file as a whole cannot be read: it is no text, has no header, or is of no known format.
    """
    text = _read_text(path)
    suffix, start = path.suffix.lower(), text.lstrip()[:1]
    if not start:
        return iter(())
    if suffix in (".csv", ".tsv"):
        return _csv_rows(path, text)
    if suffix in (".jsonl", ".ndjson") or (suffix not in TEXT_SUFFIXES and start == "{"):
        return _json_lines(path, text)
    if suffix not in TEXT_SUFFIXES and start != "[":
        rule = "is neither JSON, JSON lines, CSV nor Parquet"
        raise BadData(str(path), rule, f"Give a file that ends in {' '.join(TEXT_SUFFIXES)} .parquet.")
    if start == "{" and not _is_one_value(text):
        return _json_lines(path, text)
    return _json_array(path, text)


def load_json(text: str) -> object:
    """A JSON value, strictly: no NaN, no Infinity.

    Raises:
        ValueError: it is none; the message is short.
        RecursionError: it is nested too deep.
    """
    return _DECODER.decode(text)


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _read_text(path: Path) -> str:
    """The whole file; bytes that are no UTF-8 become lone surrogates, which are judged record by record."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadData(str(path), f"cannot be read ({error.strerror})", "Check --data.") from error
    head = data[:1024]
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head.count(0) > _MAX_NULS * len(head):
        raise BadData(str(path), "is UTF-16 or no text at all", "Save it as UTF-8.")
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _is_one_value(text: str) -> bool:
    try:
        load_json(text)
    except (ValueError, RecursionError):
        return False
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error).split(";")[0]  # an integer without end: Python adds how its limit is raised


def _wrong_encoding(where: str, text: str) -> BadData | None:
    found = _NOT_UTF8.search(text)
    if not found:
        return None
    rule = f"is not UTF-8 (byte 0x{ord(found[0]) - 0xDC00:02x} behind {text[: found.start()][-20:]!r})"
    return BadData(where, rule, "Save the file as UTF-8.")


def _json_lines(path: Path, text: str) -> Iterator[Found]:
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        where = f"{path} line {number}"
        if not line.strip():
            continue
        if wrong := _wrong_encoding(where, line):
            yield wrong
            continue
        try:
            yield Record(load_json(line), where)
        except (ValueError, RecursionError) as error:
            is_cut = number == len(lines) and line.startswith("{") and not line.rstrip().endswith("}")
            rule = "is cut off: expected a whole JSON object" if is_cut else "must be one JSON object"
            yield BadData(where, f"{rule} ({_reason(error)})", _ROW)


def _json_array(path: Path, text: str) -> Iterator[Found]:
    """The elements one by one, so that what stands in front of a broken one is read."""
    place = _skip(text, 0)
    if text[place] != "[":
        yield from _no_array(path, text)
        return
    place, number = _skip(text, place + 1), 0
    if text[place : place + 1] == "]":
        return
    while True:
        number += 1
        try:
            value, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else place
            yield _broken_array(path, text, at, f"expected a JSON object ({_reason(error)})")
            return
        where = f"{path} row {number}"
        yield _wrong_encoding(where, text[place:end]) or Record(value, where)
        place = _skip(text, end)
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            yield _broken_array(path, text, place, f"expected `,` or `]` behind row {number}")
            return
        place = _skip(text, place + 1)
    if _skip(text, place + 1) < len(text):
        yield _broken_array(path, text, _skip(text, place + 1), "expected nothing behind the array")


def _no_array(path: Path, text: str) -> Iterator[Found]:
    try:
        kind = type(load_json(text)).__name__
    except (ValueError, RecursionError) as error:
        yield BadData(
            str(path), f"cannot be read as JSON ({_reason(error)})", "Give a JSON array of objects."
        )
        return
    rule = f"must hold a JSON array of objects, holds a {kind}"
    raise BadData(str(path), rule, 'Write [{"instruction": "...", "input": "", "output": "..."}, ...].')


def _skip(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _broken_array(path: Path, text: str, place: int, rule: str) -> BadData:
    where = f"{path} line {text.count(chr(10), 0, place) + 1}"
    fix = "Close the array with ]." if place >= len(text) else "Mend it; what follows cannot be read."
    return BadData(where, f"cannot be read as JSON: {rule}", fix)


def _csv_rows(path: Path, text: str) -> Iterator[Found]:
    first_line = text.lstrip().split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = _csv_header(path, reader)
    while True:
        where = f"{path} line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadData(where, *_csv_problem(error))
            continue
        if not cells:
            continue
        if wrong := _wrong_encoding(where, delimiter.join(cells)):
            yield wrong
        elif len(cells) != len(header):
            rule = f"has {len(cells)} fields, expected the header's {len(header)}: {', '.join(header)}"
            yield BadData(where, rule, "Put a text that holds the delimiter or a line break in quotes.")
        else:
            yield Record(dict(zip(header, cells, strict=True)), where)


def _csv_header(path: Path, reader: Iterator[list[str]]) -> list[str]:
    try:
        header = [name.strip() for name in next(cells for cells in reader if cells)]
    except (csv.Error, StopIteration) as error:
        rule = f"expected a line of column names ({error or 'there is none'})"
        raise BadData(f"{path} line 1", rule, "Begin the file with, for example, input,target.") from error
    if wrong := _wrong_encoding(f"{path} line 1", " ".join(header)):
        raise wrong
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice or "\0" in "".join(header):
        rule = f"names column `{twice[0]}` twice" if twice else "holds a NUL character"
        raise BadData(f"{path} line 1", rule, "Give each column a name of its own.")
    return header


def _csv_problem(error: csv.Error) -> tuple[str, str]:
    """Rule and fix."""
    if "unexpected end" in str(error):
        return "a quote that opens here is never closed", 'Close it; a quote inside a text is written "".'
    return f"cannot be read as CSV ({error})", 'Put the text in quotes; a quote inside is written "".'
