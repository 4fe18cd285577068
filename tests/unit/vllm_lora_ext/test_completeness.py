"""When a folder is all there: every way of half a copy, and nothing that waiting cannot cure."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_lora_ext.completeness import incomplete
from vllm_lora_ext.sources import find_sources

MakeAdapter = Callable[..., Path]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def test_an_adapter_is_complete(make_adapter: MakeAdapter) -> None:
    assert incomplete(make_adapter()) is None


def test_the_order_of_copying_does_not_matter(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    whole = make_adapter()
    for order in ((CONFIG, WEIGHTS), (WEIGHTS, CONFIG)):
        copy = tmp_path / order[0]
        copy.mkdir()
        assert incomplete(copy)
        shutil.copy(whole / order[0], copy)
        assert incomplete(copy) == f"{order[1]} is not there"
        shutil.copy(whole / order[1], copy)
        assert incomplete(copy) is None


def test_a_config_is_incomplete_at_every_cut(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    body = {"r": 8, "p": {"a{2}": {"c": [1.5e1, None, True]}}, "text": '小"}\\{李}', "end": {}}
    for whole in (json.dumps(body).encode(), json.dumps(body, ensure_ascii=False, indent=1).encode()):
        for cut in range(len(whole)):
            for reserved in (b"", bytes(len(whole) - cut)):  # some copies reserve the space first
                (folder / CONFIG).write_bytes(whole[:cut] + reserved)
                assert (incomplete(folder) or "").startswith(CONFIG), whole[:cut]
        (folder / CONFIG).write_bytes(whole + b"\n")
        assert incomplete(folder) is None


def test_weights_are_incomplete_at_every_cut(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    whole = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for cut in (0, 1, 7, 8, 9, 100, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:cut])
        assert (incomplete(folder) or "").startswith(WEIGHTS), cut
        if cut < header:  # space that was reserved
            (folder / WEIGHTS).write_bytes(whole[:cut] + bytes(len(whole) - cut))
            assert (incomplete(folder) or "").startswith(WEIGHTS), cut
    (folder / WEIGHTS).write_bytes(whole + b"\0")
    assert incomplete(folder) == f"{WEIGHTS} has {len(whole) + 1} bytes, its header states {len(whole)}"


def test_a_copy_by_rsync_is_complete_once_its_own_names_are_gone(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    partial = folder / f".{WEIGHTS}.aB3xZ9"
    shutil.copy(folder / WEIGHTS, partial)
    assert incomplete(folder) == f"{partial.name} is there, which a copy leaves once it is done"
    partial.rename(folder / WEIGHTS)
    assert incomplete(folder) is None
    for name in (f".{CONFIG}.swp", f"{WEIGHTS}.index.json", ".optimizer.pt.aB3xZ9", f"{CONFIG}.backup"):
        (folder / name).touch()
    assert incomplete(folder) is None, "what has nothing to do with it"


@pytest.mark.parametrize(
    "config",
    [b"[1, 2]", b"8", b'{"r": 8,}', b'{"r": 1, "r": 2}', b'{"r": NaN}', b"{}" + b" " * (1 << 20), b"}"],
)
def test_a_config_that_is_wrong_for_good_is_left_to_admission(
    config: bytes, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter()
    (folder / CONFIG).write_bytes(config)
    assert incomplete(folder) is None


@pytest.mark.parametrize(
    "weights",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        (2).to_bytes(8, "little") + b"{}",
        (9).to_bytes(8, "little") + b"not JSON!" + b"more",
    ],
)
def test_weights_that_are_wrong_for_good_are_left_to_admission(
    weights: bytes, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter()
    (folder / WEIGHTS).write_bytes(weights)
    assert incomplete(folder) is None


def test_no_file_is_waited_for_where_something_else_stands(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    for name in (WEIGHTS, CONFIG):
        (folder / name).unlink()
        (folder / name).mkdir()
        assert incomplete(folder) is None
        (folder / name).rmdir()
        os.mkfifo(folder / name)
        assert incomplete(folder) is None
    (folder / CONFIG).unlink()
    assert incomplete(folder) == f"{CONFIG} is not there"


def test_a_pickle_is_refused_and_not_waited_for(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert incomplete(folder) is None


def test_links_are_followed_and_one_that_leads_nowhere_is_waited_for(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter()
    blob = tmp_path / "blob"
    (folder / WEIGHTS).rename(blob)
    (folder / WEIGHTS).symlink_to(blob)
    assert incomplete(folder) is None
    blob.rename(tmp_path / "other")
    assert incomplete(folder) == f"{WEIGHTS} is not there"


def test_a_file_that_becomes_shorter_is_being_written(
    make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter()
    monkeypatch.setattr("vllm_lora_ext.files.read_chunk", lambda file, target: 0)
    assert incomplete(folder) == f"{CONFIG} is being written"


def test_checkpoints_and_hidden_folders_are_no_names(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    for name in ("a", "checkpoint-5", ".hidden", "org/b", "org/checkpoint-5", "run/checkpoint-5"):
        make_adapter(name)
    assert [source.name for source in find_sources([str(tmp_path / "adapters")])] == ["a", "org/b", "run"]
    (one,) = find_sources([str(tmp_path / "adapters" / "checkpoint-5")])
    assert one.name == "checkpoint-5", "stated itself, it is one"
