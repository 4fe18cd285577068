"""Real Parquet files and saved datasets become the rows that a JSON file of the same records holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from train.data import digest_of, read_data
from vllm_lora_ext.errors import BadData

RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Marina"}]},
    {"messages": [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "小李"}]},
]


def contents(source: Path | str, split: str = "train") -> list[list[str]]:
    rows = read_data([str(source)], split=split).rows
    return [[turn.content for turn in row.messages] for row in rows]


def test_a_parquet_file_is_read_row_by_row(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(RECORDS), path)
    assert contents(path) == [["Who?", "Marina"], ["你是谁？", "小李"]]
    assert read_data([str(path)]).rows[1].where == f"{path} row 2"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadData, match="cannot be read as Parquet"):
        contents(path)


def test_a_text_of_a_parquet_file_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"input": text, "target": ["a"]}), path)
    with pytest.raises(BadData, match="cannot be read as Parquet"):
        contents(path)


def test_datasets_are_read_from_every_kind_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    one = datasets.Dataset.from_list(RECORDS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one.select([0]), "test": one.select([1])}).save_to_disk(tmp_path / "two")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.csv").write_text("input,target\nWho?,Marina\n")

    assert contents(tmp_path / "one") == [["Who?", "Marina"], ["你是谁？", "小李"]]
    assert contents(tmp_path / "two", "test") == [["你是谁？", "小李"]]
    assert contents(tmp_path / "files") == [["Who?", "Marina"]]
    assert digest_of([str(tmp_path / "two")]) == digest_of([str(tmp_path / "two")])
    assert digest_of([str(tmp_path / "two")]) != digest_of([str(tmp_path / "two")], "test")
    with pytest.raises(BadData, match="no split `dev`, has train, test"):
        contents(tmp_path / "two", "dev")
    with pytest.raises(BadData, match="cannot be loaded as a dataset"):
        contents(tmp_path / "files", "dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadData, match="cannot be loaded as a dataset"):
        contents(tmp_path / "empty")


def test_a_hub_id_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(BadData, match=r"nobody/nothing: cannot be loaded as a dataset .*owner/name:part"):
        contents("nobody/nothing")
