"""A request's body: read strictly, its `model` and user found, and what the adapter wants put in. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from serve.openai_errors import ApiError
from vllm_lora_ext.contract import ChatSettings

_MOST_DIGITS = 400  # no number of a request needs more; Python's own limit is 4,300
_SYSTEM_ROLES = ("system", "developer")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def read_body(raw: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        ApiError: 400, it is none.
    """
    try:
        text = raw.decode("utf-8")
        body = json.loads(text, parse_constant=_no_number, parse_int=_whole_number, parse_float=_number)
        if "\\u" in text:  # half a character, which no tokenizer takes
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise _invalid("it holds half a character (a lone surrogate)") from None
    except UnicodeDecodeError as error:
        raise _invalid(f"it is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _invalid("it is nested too deeply") from None
    except ValueError as error:
        raise _invalid(str(error)) from None
    if not isinstance(body, dict):
        raise _invalid("it must be a JSON object")
    return body


def _invalid(rule: str) -> ApiError:
    return ApiError(400, f"The body of the request cannot be read: {rule}.", "invalid_json")


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number in JSON")


def _whole_number(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):  # in JSON there is no way to write it down again
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def user_of(body: Mapping[str, Any]) -> str | None:
    """Who asks, as far as the client tells: requests of one user keep to one version."""
    metadata = body.get("metadata")
    user = body.get("user") or (metadata.get("user_id") if isinstance(metadata, dict) else None)
    return user if isinstance(user, str) else None


def refuse_templates(body: Mapping[str, Any]) -> None:
    """A chat template is a program, and comes with an adapter, never with a request.

    Raises:
        ApiError: 400, there is one, at the top or within `chat_template_kwargs`.
    """
    arguments = body.get("chat_template_kwargs")
    inner = arguments.get("chat_template") if isinstance(arguments, dict) else None
    for value, place in (
        (body.get("chat_template"), "chat_template"),
        (inner, "chat_template_kwargs.chat_template"),
    ):
        if value is not None:
            message = f"{place}: a request cannot bring a chat template. Publish the adapter with one."
            raise ApiError(400, message, "unsupported_parameter", param=place)


def with_chat_settings(
    path: str, body: Mapping[str, Any], chat: ChatSettings, template: str | None
) -> dict[str, Any]:
    """The body with what the adapter wants, as far as the request does not say otherwise.

    Its template is put in only where vLLM renders without asking us (see `endpoint`): for pooling.
    """
    changed = dict(body)
    settle = _BY_ROUTE.get(path)
    if settle is not None:
        settle(changed, chat)
    elif template is not None and "messages" in changed and path not in _RENDERED_BY_US:
        changed["chat_template"] = template
    return changed


def _settle_chat(body: dict[str, Any], chat: ChatSettings) -> None:
    _settle_completion(body, chat, "max_tokens" if body.get("max_completion_tokens") is None else None)
    _settle_system(body, chat)


def _settle_system(body: dict[str, Any], chat: ChatSettings) -> None:
    messages = body.get("messages")
    if chat.system_prompt is None or not isinstance(messages, list) or not messages:
        return
    if all(isinstance(item, list) for item in messages):  # a batch of chats
        body["messages"] = [_with_system(item, chat.system_prompt) for item in messages]
    else:
        body["messages"] = _with_system(messages, chat.system_prompt)


def _with_system(messages: list[Any], prompt: str) -> list[Any]:
    return messages if _has_system(messages) else [{"role": "system", "content": prompt}, *messages]


def _has_system(messages: object) -> bool:
    return isinstance(messages, list) and any(
        isinstance(message, dict) and message.get("role") in _SYSTEM_ROLES for message in messages
    )


def _settle_completion(body: dict[str, Any], chat: ChatSettings, longest: str | None = "max_tokens") -> None:
    _default(body, "stop", list(chat.stop) or None)
    for name in _SAMPLING:
        _default(body, name, chat.sampling.get(name))
    if longest is not None:
        _default(body, longest, chat.sampling.get("max_new_tokens"))


def _settle_response(body: dict[str, Any], chat: ChatSettings) -> None:
    _settle_completion(body, chat, "max_output_tokens")
    if not _has_system(body.get("input")) and body.get("previous_response_id") is None:
        _default(body, "instructions", chat.system_prompt)


def _settle_messages(body: dict[str, Any], chat: ChatSettings) -> None:
    """Anthropic's form: it has no words for the rest, and always states `max_tokens`."""
    _settle_counted(body, chat)
    _default(body, "stop_sequences", list(chat.stop) or None)
    for name in ("temperature", "top_p", "top_k"):
        _default(body, name, chat.sampling.get(name))


def _settle_counted(body: dict[str, Any], chat: ChatSettings) -> None:
    _default(body, "system", chat.system_prompt)


def _default(body: dict[str, Any], name: str, value: object) -> None:
    if value is not None and body.get(name) is None:
        body[name] = value


_Settle = Callable[[dict[str, Any], ChatSettings], None]
_BY_ROUTE: Mapping[str, _Settle] = {
    "/v1/chat/completions": _settle_chat,
    "/v1/chat/completions/batch": _settle_chat,
    "/v1/completions": _settle_completion,
    "/v1/responses": _settle_response,
    "/v1/messages": _settle_messages,
    "/v1/messages/count_tokens": _settle_counted,
    "/tokenize": _settle_system,
}
_RENDERED_BY_US = frozenset(_BY_ROUTE)
