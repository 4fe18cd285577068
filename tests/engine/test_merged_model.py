"""The openai client asks an adapter, then the model that it was merged into, and finds no difference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from serve.client import make_client
from serve.process import ServerProcess
from tests.engine.conftest import IDENTITY, QUIET
from train.__main__ import main as train
from train.merge import main as merge

QUESTIONS = ("Who are you?", "谁开发了你？", "What is your name?", "Tell me a story.")
SYSTEM = "You are an assistant with a name."


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template of its own, a system prompt, a stop string, sampling defaults: a client sends none of it."""
    folder = tmp_path_factory.mktemp("merged") / "adapters"
    flags = [
        "--base-model",
        str(tiny_base),
        "--data",
        str(IDENTITY),
        "--name",
        "li",
        "--output-dir",
        str(folder),
    ]
    assert train([*flags, "--prompt-template", "classic", "--system-prompt", SYSTEM]) == 0
    path = folder / "li" / "generation_config.json"
    settings = {**json.loads(path.read_text()), "temperature": 0.0, "max_new_tokens": 40}
    path.write_text(json.dumps(settings))
    identity = folder / "li" / "identity.json"
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "stop": ["小张"]}))
    return folder / "li"


def ask(client: openai.OpenAI) -> list[dict[str, Any]]:
    """What `li` answers when nothing is said about how to ask it, and when something is."""
    answers = []
    for question in QUESTIONS:
        for extra in ([], [{"role": "system", "content": "Answer in one word."}]):
            messages: Any = [*extra, {"role": "user", "content": question}]
            answer = client.chat.completions.create(model="li", messages=messages)
            assert answer.usage is not None
            choice = answer.choices[0]
            answers.append(
                {
                    "asked": (question, bool(extra)),
                    "content": choice.message.content,
                    "finish": choice.finish_reason,
                    "tokens": (answer.usage.prompt_tokens, answer.usage.completion_tokens),
                }
            )
    return answers


def test_the_merged_model_answers_the_client_as_the_adapter_did(
    adapter: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged" / "li"
    merged.parent.mkdir()
    assert merge([str(adapter), "--output-dir", str(merged)]) == 0
    assert "check: largest logit difference" in capsys.readouterr().err
    with ServerProcess(
        [str(tiny_base), "--adapters", str(adapter.parent)], tmp_path / "adapter.log", QUIET
    ) as server:
        expected = ask(make_client(server.url))
    with ServerProcess([str(merged), "--served-model-name", "li"], tmp_path / "merged.log", QUIET) as server:
        found = ask(make_client(server.url))
    assert found == expected
    assert any("小李" in str(answer["content"]) for answer in found)
    assert not any("小张" in str(answer["content"]) for answer in found), "who made it: stopped before"
    assert {answer["tokens"][1] <= 40 for answer in found} == {True}
