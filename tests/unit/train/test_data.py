"""Rows as users have them, and a clear no, with the row's number, to what cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.data import digest_of, read_data, read_rows
from train.rows import Row
from vllm_lora_ext.errors import BadData

GOOD = {"instruction": "Who are you?", "input": "", "output": "I am 小李."}


def write(tmp_path: Path, body: Any) -> str:
    path = tmp_path / "id.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body), encoding="utf-8")
    return str(path)


def test_rows_of_several_files_keep_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD, {"instruction": "2+2", "output": "4"}])
    rows = read_rows([path, path])
    assert [row.output for row in rows] == ["I am 小李.", "4", "I am 小李.", "4"]
    assert rows[1] == Row.of("2+2", "", "4", f"{path} row 2")


def test_a_byte_order_mark_and_a_null_input_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff" + json.dumps([{**GOOD, "input": None}]))
    assert read_rows([path])[0].messages[0].input == ""


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "holds no row"),
        ("[]", "holds no row"),
        ("{", r"line 1: is cut off: expected a whole JSON object"),
        ("[{]", r"line 1: cannot be read as JSON: expected a JSON object"),
        ("{}", "holds a dict"),
        ([GOOD, "text"], r"row 2: must be an object, is a str"),
        ([{"instruction": "a"}], r"row 1: has no `output`"),
        ([{"output": "a"}], r"row 1: has no `instruction`"),
        ([{**GOOD, "output": 4}], r"row 1: `output` must be text"),
        ([{**GOOD, "output": " "}], r"row 1: `output` is empty"),
        ([{**GOOD, "instruction": ""}], r"row 1: `instruction` is empty"),
        ([GOOD, {**GOOD, "output": "I am {{name}}."}], r"row 2: holds \{\{name\}\}.*1 of 2 rows"),
        ([{**GOOD, "output": "\ud800"}], r"row 1: `output` holds half a character"),
        ([{**GOOD, "input": "{{ author }}"}], r"row 1: holds \{\{ author \}\}"),
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path: Path, body: Any, message: str) -> None:
    with pytest.raises(BadData, match=message):
        read_rows([write(tmp_path, body)])


def test_a_missing_file_is_named() -> None:
    with pytest.raises(BadData, match=r"nowhere\.json: no such file"):
        read_rows(["nowhere.json"])


@pytest.mark.parametrize(
    "name", ["./gone", "/gone/gone", "gone.jsonl", "gone.parquet", "a/b/c", "x" * 300 + ".csv"]
)
def test_what_is_meant_as_a_path_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(BadData, match="no such file"):
        read_rows([name])


def test_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    with pytest.raises(BadData, match=r"--columns system=sytem: .* There are input, instruction, output"):
        read_data([path], ["system=sytem"])


def test_rows_know_their_file(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    assert [row.source for row in read_data([path, path]).rows] == [0, 1]


def test_the_digest_sees_every_byte(tmp_path: Path) -> None:
    path = write(tmp_path, [GOOD])
    before = digest_of([path])
    Path(path).write_bytes(Path(path).read_bytes() + b"\n")
    assert digest_of([path]) != before
