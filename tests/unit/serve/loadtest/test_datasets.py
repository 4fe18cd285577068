"""Conversations and traces in the forms that people have them in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from serve.loadtest.datasets import read_conversations, read_trace
from vllm_lora_ext.errors import BadData

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]


def jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_conversations_end_with_their_last_question(tmp_path: Path) -> None:
    share_gpt = [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]
    path = jsonl(
        tmp_path,
        {"messages": [*CHAT, {"role": "assistant", "content": "Hello"}], "max_tokens": 9},
        {"conversations": share_gpt, "model": "xiaoli"},
        {"prompt": "Who are you?"},
    )
    first, second, third = read_conversations(path)
    assert (list(first.messages or ()), first.output_tokens) == (CHAT, 9)
    assert second.messages == ({"role": "user", "content": "你好"},) and second.model == "xiaoli"
    assert third.messages == ({"role": "user", "content": "Who are you?"},)


def test_a_trace_in_milliseconds_starts_at_zero_and_can_be_sped_up(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 27_000, "input_length": 30, "output_length": 5, "model": "marina"},
        {"timestamp": 25_000, "input_length": 10, "output_length": 3},
    ]
    first, second = read_trace(jsonl(tmp_path, *rows), speed=2.0)
    assert (first.due_s, first.input_tokens, first.output_tokens, first.model) == (0.0, 10, 3, None)
    assert (second.due_s, second.model) == (1.0, "marina")


def test_a_trace_as_csv_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Timestamp", "Model", "Request tokens", "Response tokens", "Log Type"])
        writer.writerows([[5, "ChatGPT", 472, 18, "API"], [45, "ChatGPT", 1087, 230, "API"]])
    assert [(prompt.due_s, prompt.input_tokens) for prompt in read_trace(path, 1.0)] == [(0, 472), (40, 1087)]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("not json", "line 2.*not JSON"),
        ([1], "line 2.*not a JSON object"),
        ({"text": "?"}, "line 2.*neither messages"),
        ({"messages": [{"role": "assistant", "content": "?"}]}, "line 2.*no turn of a user"),
        ({"messages": [{"role": "wizard", "content": "?"}]}, "line 2.*no role"),
        ({"messages": ["?"]}, "line 2.*no role"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: Any, says: str) -> None:
    with pytest.raises(BadData, match=says):
        read_conversations(jsonl(tmp_path, {"prompt": "fine"}, row))


@pytest.mark.parametrize(
    "row", [{"input_length": 3}, {"timestamp": 1}, {"timestamp": "x", "input_length": 1, "output_length": 1}]
)
def test_a_trace_row_without_time_or_lengths_is_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(BadData, match="line 1"):
        read_trace(jsonl(tmp_path, row), 1.0)


def test_a_windows_file_and_content_parts_and_odd_separators_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    parts = [{"type": "text", "text": "one\u2028two"}, {"type": "image_url", "image_url": {}}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": ""}]
    path.write_text("\ufeff" + json.dumps({"messages": turns}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (prompt,) = read_conversations(path)
    assert prompt.messages == ({"role": "user", "content": "one\u2028two"},)


@pytest.mark.parametrize("value", ["abc", [1], -5, 0.5, 10**30, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(BadData, match="no number of tokens"):
        read_conversations(jsonl(tmp_path, {"prompt": "Hi", "max_tokens": value}))
    with pytest.raises(BadData, match="no number of tokens"):
        read_trace(jsonl(tmp_path, {"timestamp": 1, "input_length": value, "output_length": 1}), 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 1e300])
def test_a_time_that_is_none_is_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(BadData, match="no time"):
        read_trace(jsonl(tmp_path, {"timestamp": value, "input_length": 1, "output_length": 1}), 1.0)


def test_a_trace_of_several_runs_is_refused(tmp_path: Path) -> None:
    row = {"sent_s": 1, "prompt_tokens": 1, "output_tokens": 1, "phase": "load"}
    rows = [{**row, "run": name} for name in ("a", "b")]
    with pytest.raises(BadData, match=r"2 runs.*Keep the lines of one"):
        read_trace(jsonl(tmp_path, *rows), 1.0)
    with pytest.raises(BadData, match="no request"):
        read_trace(jsonl(tmp_path, {**rows[0], "phase": "warmup"}), 1.0)


def test_nesting_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="not JSON"):
        read_conversations(jsonl(tmp_path, "[" * 100_000))


def test_an_empty_or_absent_file_is_refused(tmp_path: Path) -> None:
    for path in (jsonl(tmp_path), tmp_path / "nowhere.jsonl"):
        for read in (read_conversations, lambda path: read_trace(path, 1.0)):
            with pytest.raises(BadData, match=str(path)):
                read(path)
