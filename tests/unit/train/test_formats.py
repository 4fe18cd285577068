"""Files of rows: exact lines, every broken one named, the rest read; no bytes crash a reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from train.data import read_data
from train.formats import Record, read_file
from vllm_lora_ext.errors import BadData

GOOD = '{"instruction": "Who are you?", "output": "Marina"}'
A_FILE_EACH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)


def write(tmp_path: Path, name: str, body: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(body.encode() if isinstance(body, str) else body)
    return path


def places(path: Path) -> list[tuple[str, bool]]:
    """(place, whether it is a record) of everything that is found."""
    found = []
    for item in read_file(path):
        where = item.where if isinstance(item, Record) else item.item
        found.append((where.removeprefix(f"{path} "), isinstance(item, Record)))
    return found


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", f"\ufeff{GOOD}\r\n\r\n\n{GOOD}\nnonsense\n{GOOD}")
    assert places(path) == [("line 1", True), ("line 4", True), ("line 5", False), ("line 6", True)]


def test_a_csv_row_has_the_line_that_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'input,target\n"two\nlines",b\n\nc,d\n')
    assert places(path) == [("line 2", True), ("line 5", True)]


def test_json_lines_are_read_whatever_the_file_is_called(tmp_path: Path) -> None:
    for name in ("a.json", "a.jsonl", "a.ndjson", "a.txt", "a"):
        assert len(places(write(tmp_path, name, f"{GOOD}\n{GOOD}\n"))) == 2
    assert places(write(tmp_path, "b.txt", f"[{GOOD}]")) == [("row 1", True)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_spreadsheet_may_use_any_of_three_delimiters(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path, "a.csv", f"input{delimiter}target\nq{delimiter}a\n")
    [record] = read_file(path)
    assert isinstance(record, Record) and record.value == {"input": "q", "target": "a"}


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.jsonl", f"{GOOD}\n{GOOD[:20]}", r"line 2: is cut off.*1 of 2 rows cannot be used, 1 is fine"),
        (
            "a.jsonl",
            f"{GOOD}\n{{'a': 1}}\n{GOOD}\n",
            r"line 2: must be one JSON object \(Expecting.*column 2",
        ),
        ("a.jsonl", f'{GOOD}\n{{"output": {"9" * 5000}}}\n', r"line 2: .*4300 digits"),
        ("a.jsonl", f"{GOOD}\n{DEEP}\n", "line 2: .*nested too deep"),
        ("a.jsonl", f'{GOOD}\n{{"output": NaN}}\n', "line 2: .*NaN is no JSON"),
        (
            "a.jsonl",
            f"{GOOD}\n".encode() + '{"output": "né"}'.encode("latin-1"),
            "line 2: is not UTF-8.*0xe9",
        ),
        ("a.jsonl", f'{GOOD}\n{{"instruction": "a", "output": "\\u0000"}}\n', "`output` holds a NUL"),
        ("a.jsonl", f"{GOOD}\n3\n", "line 2: must be an object, is a int"),
        ("a.json", f"[{GOOD},\n{GOOD}", r"line 2: .*expected `,` or `]` behind row 2.*2 are fine. Close the"),
        ("a.json", f"[{GOOD},\n{DEEP}", "line 2: .*nested too deep.*1 is fine"),
        ("a.json", f"[{GOOD}]\n[", "line 2: .*expected nothing behind the array"),
        ("a.json", f"[{GOOD},\n]", "line 2: .*Expecting value at column 1"),
        ("a.json", f'[{{"instruction": "{"é"}", "output": "a"}}]'.encode("latin-1"), "row 1: is not UTF-8"),
        ("a.json", "3", "holds a int"),
        ("a.json", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\0\0", "no text at all"),
        ("a.json", GOOD.encode("utf-16"), "UTF-16"),
        ("a.txt", "Who are you? Marina.", "neither JSON, JSON lines, CSV nor Parquet"),
        ("a.csv", 'input,target\na,b\n"c,d\ne,f\n', "line 3: a quote that opens here is never closed.*1 is"),
        (
            "a.csv",
            "input,target\na,b\nc\nd,e,f\n",
            "line 3: has 1 fields.*line 4: has 3 fields.*input, target",
        ),
        ("a.csv", 'input,target\na,b\n"c"d,e\n', "line 3: cannot be read as CSV"),
        ("a.csv", "input,target\na,b\nc,\0\n", "line 3: `target` holds a NUL"),
        ("a.csv", "input,target\na,b\nc,né\n".encode("latin-1"), "line 3: is not UTF-8"),
        ("a.csv", "input,input\na,b\n", "line 1: names column `input` twice"),
        ("a.csv", '"input\n', "line 1: expected a line of column names"),
        (
            "a.csv",
            "frage,antwort\na,b\nc,d\n",
            "has no `instruction`, has frage, antwort; so it is with all 2",
        ),
        ("a.csv", "input,target\n", "holds no row"),
        ("a.csv", "", "holds no row"),
        ("a.jsonl", "\n \n", "holds no row"),
    ],
)
def test_what_is_broken_is_named(tmp_path: Path, name: str, body: str | bytes, message: str) -> None:
    with pytest.raises(BadData, match=message):
        read_data([str(write(tmp_path, name, body))])


def test_bad_rows_are_left_out_on_request_and_counted(tmp_path: Path) -> None:
    lines = [GOOD, "{", GOOD, "[]", *["nonsense"] * 5, GOOD]
    path = str(write(tmp_path, "a.jsonl", "\n".join(lines)))
    data = read_data([path], skip_bad_rows=True)
    assert [row.where for row in data.rows] == [f"{path} line {n}" for n in (1, 3, 10)]
    assert [error.item for error in data.bad] == [f"{path} line {n}" for n in (2, 4, 5, 6, 7, 8, 9)]
    with pytest.raises(
        BadData, match=r"line 2.*line 4.*line 5.*line 7: .*; \.\.\.: 7 of 10 .* --skip-bad-rows"
    ):
        read_data([path])
    with pytest.raises(BadData, match="1 of 1 rows"):  # nothing would be left
        read_data([str(write(tmp_path, "b.jsonl", "{"))], skip_bad_rows=True)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["instruction", "input", "output", "messages", "role", "content", "prompt", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    body=st.binary(max_size=200), suffix=st.sampled_from(["json", "jsonl", "csv", "tsv", "txt", "parquet"])
)
@A_FILE_EACH
def test_no_bytes_crash_a_reader(tmp_path: Path, body: bytes, suffix: str) -> None:
    try:
        read_data([str(write(tmp_path, f"a.{suffix}", body))], skip_bad_rows=True)
    except BadData as error:
        assert error.rule


@given(text=st.text('[]{}",:;\n\r\t\\ au0\ud800'), suffix=st.sampled_from(["json", "jsonl", "csv"]))
@A_FILE_EACH
def test_no_near_miss_crashes_a_reader(tmp_path: Path, text: str, suffix: str) -> None:
    path = write(
        tmp_path, f"a.{suffix}", ("input,target\n" * (suffix == "csv") + text).encode(errors="surrogatepass")
    )
    try:
        read_data([str(path)], skip_bad_rows=True)
    except BadData as error:
        assert error.rule


@given(values=st.lists(VALUES, min_size=1, max_size=5))
@A_FILE_EACH
def test_an_array_and_lines_hold_the_same_values(tmp_path: Path, values: list[Any]) -> None:
    array = write(tmp_path, "a.json", json.dumps(values, indent=1))
    lines = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, values)))
    assert [item.value for item in read_file(array) if isinstance(item, Record)] == values
    assert [item.value for item in read_file(lines) if isinstance(item, Record)] == values


# A file with many NULs is no text: it is refused whole, which other tests show.
WRITABLE = st.characters(exclude_categories=["Cs"], exclude_characters="\0")


@given(rows=st.lists(st.tuples(*[st.text(WRITABLE, min_size=1)] * 2), min_size=1))
@A_FILE_EACH
def test_what_pythons_csv_writes_is_read_back(tmp_path: Path, rows: list[tuple[str, str]]) -> None:
    import csv

    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("input", "target"), *rows])
    found = [item.value for item in read_file(path) if isinstance(item, Record)]
    assert found == [{"input": question, "target": answer} for question, answer in rows]
