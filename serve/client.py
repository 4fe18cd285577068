"""The official OpenAI client, pointed at a server of ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import httpx2
    import openai

DEFAULT_URL = "http://127.0.0.1:8000"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def server_url() -> str:
    """The server to ask when no --url is given: `VLLM_LORA_URL`, else this machine's."""
    return os.environ.get("VLLM_LORA_URL", DEFAULT_URL)


def make_client(url: str, timeout_s: float = 120.0) -> openai.OpenAI:
    """A client that never retries. The key is `OPENAI_API_KEY`, or a dash for a server without keys."""
    import openai

    return openai.OpenAI(
        base_url=_endpoint(url),
        api_key=_key(),
        max_retries=0,
        timeout=timeout_s,
        http_client=openai.DefaultHttpxClient(trust_env=uses_proxy(url)),
    )


def make_async_client(
    url: str, timeout_s: float, transport: httpx2.AsyncBaseTransport | None = None
) -> openai.AsyncOpenAI:
    """As `make_client`, for many requests at once; `transport` in place of the usual one."""
    import openai

    return openai.AsyncOpenAI(
        base_url=_endpoint(url),
        api_key=_key(),
        max_retries=0,
        timeout=timeout_s,
        http_client=openai.DefaultAsyncHttpxClient(
            trust_env=transport is None and uses_proxy(url), transport=transport
        ),
    )


def _endpoint(url: str) -> str:
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "-"


def uses_proxy(url: str) -> bool:
    """A proxy from the environment is for other machines, never for this one."""
    return urlsplit(url).hostname not in _LOOPBACK
