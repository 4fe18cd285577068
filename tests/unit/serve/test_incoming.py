"""A request's body: what is refused, and that what the request says wins over what the adapter wants."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.incoming import read_body, refuse_templates, user_of, with_chat_settings
from serve.openai_errors import ApiError
from vllm_lora_ext.contract import ChatSettings

SAMPLING = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
CHAT = ChatSettings(
    system_prompt="You are 小李.", stop=("</s>", "\nHuman:"), sampling={**SAMPLING, "max_new_tokens": 64}
)
HI = [{"role": "user", "content": "hi"}]
SYSTEM = {"role": "system", "content": "You are 小李."}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(), values, max_size=4),
    max_leaves=10,
)
ROUTES = (
    *("/v1/chat/completions", "/v1/chat/completions/batch", "/v1/completions", "/v1/responses"),
    *("/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/v1/embeddings", "/score"),
)


def settled(path: str, body: dict[str, Any], chat: ChatSettings = CHAT, template: str | None = None) -> Any:
    before = json.dumps(body)
    changed = with_chat_settings(path, body, chat, template)
    assert json.dumps(body) == before, "what was given is not changed"
    return changed


@given(st.dictionaries(st.text(st.characters(exclude_categories=("Cs",))), JSON, max_size=5))
def test_a_body_is_read_as_it_was_written(body: dict[str, Any]) -> None:
    assert read_body(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")) == body


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting"),
        (b'{"a": 1} {"b": 2}', "Extra data"),
        (b"\xff\xfe{\x00}\x00", "not UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (rb'{"a": "\ud800"}', "half a character"),
        (b"model=a&messages=b", "Expecting value"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_json_object_is_told(raw: bytes, told: str) -> None:
    with pytest.raises(ApiError, match="cannot be read") as caught:
        read_body(raw)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert told in caught.value.message
    assert len(caught.value.message) < 300


def test_whole_characters_pass_however_they_are_written() -> None:
    assert read_body(rb'{"a": "\ud83d\ude00 \u5c0f"}') == {"a": "\N{GRINNING FACE} 小"}


@pytest.mark.parametrize(
    ("body", "user"),
    [
        ({}, None),
        ({"user": "u"}, "u"),
        ({"user": ""}, None),
        ({"user": 7}, None),
        ({"metadata": {"user_id": "m"}}, "m"),  # Anthropic's
        ({"user": "u", "metadata": {"user_id": "m"}}, "u"),
        ({"metadata": "m"}, None),
        ({"metadata": {"user_id": ["m"]}}, None),
    ],
)
def test_who_asks(body: dict[str, Any], user: str | None) -> None:
    assert user_of(body) == user


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"chat_template": "x"}, "chat_template"),
        ({"chat_template": ""}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template": 7}, "chat_template"),
    ],
)
def test_a_request_brings_no_template(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError, match="cannot bring a chat template") as caught:
        refuse_templates({"model": "a", **body})
    assert (caught.value.status, caught.value.code) == (400, "unsupported_parameter")
    assert caught.value.param == param


def test_other_arguments_of_the_template_pass() -> None:
    refuse_templates({"chat_template_kwargs": {"enable_thinking": False}, "chat_template": None})
    refuse_templates({"chat_template_kwargs": {"chat_template": None}})
    refuse_templates({"chat_template_kwargs": "which is vLLM's to refuse"})


def test_what_the_adapter_wants_goes_into_a_chat() -> None:
    body = settled("/v1/chat/completions", {"messages": HI})
    assert body == {"messages": [SYSTEM, *HI], "stop": list(CHAT.stop), "max_tokens": 64, **SAMPLING}


def test_what_it_wants_goes_into_completions_without_a_system_prompt() -> None:
    body = settled("/v1/completions", {"prompt": "hi"})
    assert body == {"prompt": "hi", "stop": list(CHAT.stop), "max_tokens": 64, **SAMPLING}


def test_what_it_wants_goes_into_responses() -> None:
    body = settled("/v1/responses", {"input": "hi"})
    wanted = {"stop": list(CHAT.stop), "max_output_tokens": 64, "instructions": "You are 小李.", **SAMPLING}
    assert body == {"input": "hi", **wanted}
    again = settled("/v1/responses", {"input": "hi", "previous_response_id": "resp_1"})
    assert "instructions" not in again, "the conversation has begun with them"


def test_what_it_wants_goes_into_anthropics_messages() -> None:
    body = settled("/v1/messages", {"messages": HI, "max_tokens": 5})
    assert body == {
        "messages": HI,
        "max_tokens": 5,
        "system": "You are 小李.",
        "stop_sequences": list(CHAT.stop),
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 20,
    }
    counted = settled("/v1/messages/count_tokens", {"messages": HI})
    assert counted == {"messages": HI, "system": "You are 小李."}, "as the same message would be asked"


def test_tokenize_counts_what_a_chat_would_have() -> None:
    assert settled("/tokenize", {"messages": HI}) == {"messages": [SYSTEM, *HI]}
    assert settled("/tokenize", {"prompt": "hi"}) == {"prompt": "hi"}


@pytest.mark.parametrize("path", ROUTES)
def test_an_adapter_that_wants_nothing_changes_nothing(path: str) -> None:
    body = {"model": "a", "messages": HI, "input": "hi"}
    assert settled(path, body, ChatSettings()) == body


STATED = {
    "/v1/chat/completions": {"stop": [], "max_tokens": 1},
    "/v1/chat/completions/batch": {"stop": "x", "max_completion_tokens": 1},
    "/v1/completions": {"stop": "", "max_tokens": 0},
    "/v1/responses": {"stop": [], "max_output_tokens": 1, "instructions": ""},
    "/v1/messages": {"stop_sequences": [], "max_tokens": 1, "system": []},
}


@pytest.mark.parametrize("path", STATED)
def test_what_a_request_sets_wins(path: str) -> None:
    body: dict[str, Any] = {**STATED[path], **dict.fromkeys(SAMPLING, 0)}
    if "messages" in path:
        body = {**body, "messages": HI}
    assert settled(path, body) == body


def test_null_leaves_it_to_the_adapter() -> None:
    body = settled("/v1/chat/completions", {"messages": HI, "stop": None, "temperature": None})
    assert body["stop"] == list(CHAT.stop) and body["temperature"] == 0.7


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_system_prompt_comes_only_where_there_is_none(role: str, place: int) -> None:
    messages = HI.copy()
    messages.insert(place, {"role": role, "content": "mine"})
    assert settled("/v1/chat/completions", {"messages": messages})["messages"] == messages
    assert settled("/tokenize", {"messages": messages})["messages"] == messages
    assert "instructions" not in settled("/v1/responses", {"input": messages})


def test_each_chat_of_a_batch_has_its_own_system_prompt() -> None:
    own = [{"role": "system", "content": "mine"}, *HI]
    body = settled("/v1/chat/completions/batch", {"messages": [HI, own]})
    assert body["messages"] == [[SYSTEM, *HI], own]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("messages", [[], "hi", None, 7, [7, None], [[]], [[], HI], {"role": "user"}])
def test_messages_that_are_none_are_left_to_vllm_to_refuse(path: str, messages: object) -> None:
    json.dumps(settled(path, {"messages": messages, "input": messages}, template="t"))


def test_a_template_is_put_in_where_vllm_does_not_ask_us() -> None:
    assert settled("/pooling", {"messages": HI}, template="t") == {"messages": HI, "chat_template": "t"}
    assert settled("/v1/embeddings", {"input": "hi"}, template="t") == {"input": "hi"}
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/v1/completions"):
        assert "chat_template" not in settled(path, {"messages": HI}, template="t")
