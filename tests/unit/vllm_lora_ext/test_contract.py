"""Chat settings: the trained template is vouched for, any other is used and shown as unproven."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_lora_ext.contract import (
    ChatSettings,
    Identity,
    is_ours,
    read_chat_settings,
    template_to_use,
    write_contract,
)
from vllm_lora_ext.errors import BadInput

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


def test_a_stated_template_gives_way_to_a_trained_one_only() -> None:
    trained, foreign = ChatSettings("t", trained=True), ChatSettings("f")
    assert template_to_use(trained, None) == template_to_use(trained, "stated.jinja") == "t"
    assert template_to_use(foreign, None) == "f"
    assert template_to_use(foreign, "stated.jinja") is None
    assert template_to_use(ChatSettings(), None) is None
