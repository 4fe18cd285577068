"""Files are read into memory of our own, and whatever is wrong with them is an error in words."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_lora_ext import files
from vllm_lora_ext.engine.weights import read_config, read_tensors

TENSORS = {
    "a.lora_A.weight": torch.randn(4, 6),
    "a.lora_B.weight": torch.randn(3, 4).to(torch.bfloat16),
    "empty": torch.zeros(0, 5, dtype=torch.float16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    return tmp_path


def write_raw(folder: Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_tensors_come_back_as_they_were_saved(folder: Path) -> None:
    tensors = read_tensors(folder)
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_what_was_read_outlives_its_file(folder: Path) -> None:
    tensors = read_tensors(folder)
    os.truncate(folder / "adapter_model.safetensors", 0)
    assert torch.equal(tensors["a.lora_A.weight"], TENSORS["a.lora_A.weight"])


def test_a_file_that_shrinks_while_it_is_read_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, upstream = folder / "adapter_model.safetensors", files.read_chunk

    def read_chunk(file: int, target: memoryview) -> int:
        count = upstream(file, target)
        if count > 8:  # the header was read
            os.truncate(path, 200)
        return count

    monkeypatch.setattr(files, "read_chunk", read_chunk)
    with pytest.raises(ValueError, match="ends after"):
        read_tensors(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_pipe_is_refused_without_waiting_for_its_other_end(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="no regular file"):
        read_config(folder)
        read_tensors(folder)


ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        {**ENTRY, "data_offsets": [0, 400]},
        {**ENTRY, "data_offsets": [-16, 0]},
        {**ENTRY, "data_offsets": [16, 0]},
        {**ENTRY, "data_offsets": [0]},
        {**ENTRY, "shape": [2, 3]},
        {**ENTRY, "shape": [-2, -2]},
        {**ENTRY, "shape": [2.0, 2]},
        {**ENTRY, "shape": [True, 4]},
        {**ENTRY, "shape": "22"},
        {**ENTRY, "dtype": "I32"},
        {"dtype": "F32"},
        [],
        None,
    ],
)
def test_an_entry_that_does_not_fit_the_file_is_refused(folder: Path, entry: object) -> None:
    write_raw(folder, {"a.weight": entry}, bytes(16))
    with pytest.raises(ValueError, match=r"'a\.weight'|I32 tensors"):
        read_tensors(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        (2**60).to_bytes(8, "little"),
        (3).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (5).to_bytes(8, "little") + b"{no}}",
    ],
)
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(ValueError):
        read_tensors(folder)


def test_a_header_nested_without_end_is_refused(folder: Path) -> None:
    write_raw(folder, b'{"a":' + b"[" * 100_000)
    with pytest.raises(ValueError):
        read_tensors(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must hold an object"),
        ("{", "Expecting"),
        ("[" * 100_000, "nested"),
        ('{"rank_pattern": {"(.|.)+x": 8}}', "pattern_unsupported"),
        ('{"alpha_pattern": {"(a*)*": 8}}', "pattern_unsupported"),
        (" " * (2 << 20), "at most"),
    ],
)
def test_a_config_that_must_not_reach_the_engine_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_config(folder)
