"""Chat settings: the trained template is vouched for, any other is used and shown as unproven."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_lora_ext.contract import (
    BadChatSettings,
    ChatSettings,
    Identity,
    is_ours,
    read_chat_settings,
    template_to_use,
    write_contract,
)
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.strict_json import canonical

TEMPLATE = "{{ messages[0]['content'] }}\r\n\n小李"  # must survive byte for byte


def test_what_is_written_is_read_back_as_trained(tmp_path: Path) -> None:
    write_contract(tmp_path, Identity("xiaoli", TEMPLATE, {"seed": 42}))
    chat = read_chat_settings(tmp_path)
    assert (chat.template, chat.trained, chat.state) == (TEMPLATE, True, "trained")
    assert is_ours(tmp_path)
    assert json.loads((tmp_path / "identity.json").read_text())["provenance"] == {"seed": 42}


def test_a_template_that_was_changed_is_no_longer_vouched_for(tmp_path: Path) -> None:
    write_contract(tmp_path, Identity("xiaoli", TEMPLATE))
    (tmp_path / "chat_template.jinja").write_text("{{ other }}")
    assert read_chat_settings(tmp_path).state == "unproven"


def test_a_foreign_template_is_unproven(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert read_chat_settings(tmp_path).state == "unproven"
    assert not is_ours(tmp_path)


def test_the_template_of_a_saved_tokenizer_counts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ old }}"}')
    assert read_chat_settings(tmp_path).template == "{{ old }}"


def test_without_a_template_the_bases_own_is_used(tmp_path: Path) -> None:
    assert read_chat_settings(tmp_path).state == "base"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[" * 100_000),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadInput, match=file):
        read_chat_settings(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("generation_config.json", b'{"temperature": 1' + b"0" * 400 + b"}"),
        ("generation_config.json", b'{"top_p": NaN}'),
        ("generation_config.json", b'{"top_k": 1e999}'),
        ("identity.json", b'{"provenance": {"loss": 1e999}}'),
        ("identity.json", b'{"provenance": {"of": "\\ud800"}}'),
        ("identity.json", json.dumps({"files": {f"f{i}": "0" for i in range(101)}}).encode()),
        ("identity.json", json.dumps({"files": {"a\n": "0"}}).encode()),
    ],
)
def test_what_nobody_could_write_again_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BadChatSettings, match=file) as refused:
        read_chat_settings(tmp_path)
    assert refused.value.code == "chat_settings_invalid"


@pytest.mark.parametrize(
    ("put", "code"),
    [
        (os.mkfifo, "not_regular_file"),
        (Path.mkdir, "not_regular_file"),
        (lambda path: path.symlink_to("/etc/hostname"), "link_refused"),
        (lambda path: path.write_bytes(b"x" * ((1 << 20) + 1)), "too_large"),
        (lambda path: path.write_bytes(b"\xff"), "chat_settings_invalid"),
    ],
    ids=["pipe", "folder", "link", "large", "no text"],
)
def test_what_is_no_chat_file_has_the_code_of_its_kind(
    tmp_path: Path, put: Callable[[Path], object], code: str
) -> None:
    put(tmp_path / "chat_template.jinja")
    with pytest.raises(BadChatSettings) as refused:
        read_chat_settings(tmp_path, follow_links=False)
    assert refused.value.code == code


def test_numbers_that_are_equal_are_written_alike() -> None:
    one, other = (
        ChatSettings(sampling={"top_p": 1.0, "top_k": 20}),
        ChatSettings(sampling={"top_k": 20.0, "top_p": 1}),
    )
    assert canonical(one.canonical()) == canonical(other.canonical())


def test_a_stated_template_gives_way_to_a_trained_one_only() -> None:
    trained, foreign = ChatSettings("t", trained=True), ChatSettings("f")
    assert template_to_use(trained, None) == template_to_use(trained, "stated.jinja") == "t"
    assert template_to_use(foreign, None) == "f"
    assert template_to_use(foreign, "stated.jinja") is None
    assert template_to_use(ChatSettings(), None) is None
