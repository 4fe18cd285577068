"""What the load test learns from a server before it loads it: its models, how it counts tokens, its slots."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2
import openai

from serve.client import make_client, uses_proxy
from serve.loadtest.client import error_detail
from serve.loadtest.workload import WORDS, TokenScale
from vllm_lora_ext.errors import (
    AdapterUnknown,
    ServerFailed,
    ServerUnreachable,
    VllmLoraError,
)

_FACTS_TIMEOUT_S = 60.0
_PAGE_TIMEOUT_S = 10.0
# What the client raises for a server that is not there, refuses, or answers something else than it should.
_ODD_ANSWERS = (
    openai.OpenAIError,
    httpx2.HTTPError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    RecursionError,
)
_MAX_LORA = re.compile(r'^vllm:lora_requests_info\{[^}]*max_lora="(\d+)"', re.MULTILINE)


@dataclass(frozen=True)
class ServedModels:
    """`base` is None where the server does not tell which one it is. `all_names` are those not asked, too."""

    base: str | None
    adapters: tuple[str, ...]
    all_names: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The base first."""
        return (self.base, *self.adapters) if self.base is not None else self.adapters


def served_models(url: str) -> ServedModels:
    """Names from `/v1/models`. vLLM's cards name an adapter's `parent`; a model alone is a base.

    Raises:
        ServerUnreachable, ServerFailed: there is no server, or it refuses.
    """
    try:
        cards = list(make_client(url, _FACTS_TIMEOUT_S).models.list())
        parents = {card.id: (card.model_extra or {}).get("parent") for card in cards}
        if not all(isinstance(name, str) and name for name in parents):
            raise ValueError("a model without a name")
        named = {parent for parent in parents.values() if isinstance(parent, str)}
    except _ODD_ANSWERS as error:
        raise server_error(url, error) from error
    roots = [name for name, parent in parents.items() if not parent]
    if len(parents) == 1 or (named and len(roots) >= 1):
        base = next((name for name in roots if name in named), roots[0])
        return ServedModels(base, tuple(name for name in parents if name not in roots), tuple(parents))
    return ServedModels(None, tuple(parents), tuple(parents))


def chosen_models(url: str, wanted: Sequence[str], ask: bool = True) -> ServedModels:
    """The models to ask: all that are served, or those of `wanted`, in their order.

    One that is not listed may be served all the same, and is asked for a token, unless `ask` forbids it.

    Raises:
        AdapterUnknown: the server does not serve one of them.
        ServerUnreachable, ServerFailed: there is no server, or it refuses.
    """
    served = served_models(url)
    if not wanted:
        if not served.names:
            raise ServerFailed(url, "serves no model", "Is it ready?")
        return served
    for name in wanted:
        if name not in served.names and ask:
            _require_answer(url, name, served.names)
    adapters = tuple(dict.fromkeys(name for name in wanted if name != served.base))
    names = tuple(dict.fromkeys((*served.all_names, *wanted)))
    return ServedModels(served.base if served.base in wanted else None, adapters, names)


def measure_scale(url: str, model: str) -> tuple[TokenScale, bool]:
    """How made-up prompts become tokens, from two short questions; and whether the server takes `ignore_eos`.

    Raises:
        ServerFailed: it answers neither.
    """
    client = make_client(url, _FACTS_TIMEOUT_S)
    takes_ignore_eos = True
    try:
        few = _prompt_tokens(client, model, 8, takes_ignore_eos)
    except (openai.BadRequestError, openai.UnprocessableEntityError):
        takes_ignore_eos = False
        few = _guarded(url, lambda: _prompt_tokens(client, model, 8, takes_ignore_eos))
    except _ODD_ANSWERS as error:
        raise server_error(url, error) from error
    many = _guarded(url, lambda: _prompt_tokens(client, model, len(WORDS), takes_ignore_eos))
    if not 0 < few < many:
        return TokenScale(), takes_ignore_eos  # no usage: a word counts as a token
    per_word = (many - few) / (len(WORDS) - 8)
    return TokenScale(max(0.0, few - 8 * per_word), per_word), takes_ignore_eos


def adapter_slots(url: str) -> int | None:
    """`max_loras` of a vLLM server, which its metrics name once an adapter was asked; None elsewhere."""
    text = scrape(url)
    found = _MAX_LORA.search(text) if text else None
    return int(found[1]) if found and int(found[1]) else None


def server_version(url: str) -> str | None:
    """What vLLM tells at `/version`; None elsewhere."""
    text = _page(url, "version")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text or "")["version"])
    return None


def scrape(url: str) -> str | None:
    """The server's `/metrics`; None if it has none."""
    return _page(url, "metrics")


def _page(url: str, name: str) -> str | None:
    with contextlib.suppress(httpx2.HTTPError, httpx2.InvalidURL):
        root = url.rstrip("/").removesuffix("/v1")
        answer = httpx2.get(f"{root}/{name}", timeout=_PAGE_TIMEOUT_S, trust_env=uses_proxy(url))
        if answer.status_code == httpx2.codes.OK:
            return answer.text
    return None


def server_error(url: str, error: Exception) -> VllmLoraError:
    """Our error for one of the client's."""
    if isinstance(error, openai.APITimeoutError):
        return ServerUnreachable(
            url, "takes a connection and does not answer", "Is it busy, or still starting?"
        )
    if isinstance(error, openai.APIConnectionError):
        fix = "Start one with `vllm-lora serve`, or give --url."
        return ServerUnreachable(url, f"no server answers ({error_detail(error)[:100]})", fix)
    if isinstance(error, openai.APIStatusError):
        fix = "Is OPENAI_API_KEY set?" if error.status_code in (401, 403) else ""
        words = error.body.get("message") if isinstance(error.body, dict) else None
        told = f": {str(words)[:200].rstrip('.')}" if words else ""
        return ServerFailed(url, f"answers HTTP {error.status_code}{told}", fix)
    rule = f"the answer cannot be read ({type(error).__name__})"
    return ServerFailed(url, rule, "Is it an OpenAI-compatible server?")


def _require_answer(url: str, name: str, served: Sequence[str]) -> None:
    """A name that is not listed may be served all the same: a pinned version, a resolver's."""
    try:
        _prompt_tokens(make_client(url, _FACTS_TIMEOUT_S), name, 1, False)
    except openai.NotFoundError as error:
        near = difflib.get_close_matches(name, served, n=1)
        fix = f"Did you mean {near[0]}?" if near else f"Served are: {', '.join(served[:20]) or 'none'}."
        raise AdapterUnknown(name, "the server has no model of that name", fix, adapter=name) from error
    except _ODD_ANSWERS as error:
        raise server_error(url, error) from error


def _guarded(url: str, ask: Any) -> int:
    try:
        return int(ask())
    except _ODD_ANSWERS as error:
        raise server_error(url, error) from error


def _prompt_tokens(client: openai.OpenAI, model: str, words: int, ignore_eos: bool) -> int:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": " ".join(WORDS[:words])}],
        max_tokens=1,
        temperature=0.0,
        extra_body={"ignore_eos": True} if ignore_eos else None,
    )
    tokens = answer.usage.prompt_tokens if answer.usage else 0
    return tokens if type(tokens) is int else 0
