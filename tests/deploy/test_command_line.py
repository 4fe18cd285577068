"""The commands of deploy/ before vLLM's own parser. Not in `make check`: importing vLLM takes ten seconds."""

from __future__ import annotations

import pytest

from serve.launch import parse_with_vllm
from tests.deploy.manifests import commands

pytest.importorskip("vllm")


@pytest.mark.parametrize(
    "place, words", commands(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_vllm_takes_the_line(place: str, words: list[str]) -> None:
    filled = [word.replace("${BASE_MODEL:-", "").rstrip("}") for word in words[1:]]
    args, _ = parse_with_vllm(filled)
    assert args.adapters == ["/adapters"]
    assert str(args.state_dir) == "/state/vllm-lora"
