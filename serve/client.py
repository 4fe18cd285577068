"""The official OpenAI client, pointed at a server of ours."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2

from vllm_lora_ext.errors import BadSetting

if TYPE_CHECKING:
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
        base_url=endpoint(url),
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
        base_url=endpoint(url),
        api_key=_key(),
        max_retries=0,
        timeout=timeout_s,
        http_client=openai.DefaultAsyncHttpxClient(
            trust_env=transport is None and uses_proxy(url), transport=transport
        ),
    )


def endpoint(url: str) -> str:
    """Where the interface begins, whether the URL that was given ends with `/v1` or not."""
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def _key() -> str:
    return os.environ.get("OPENAI_API_KEY") or "-"


def uses_proxy(url: str) -> bool:
    """A proxy from the environment is for other machines, never for this one."""
    return urlsplit(url).hostname not in _LOOPBACK


def without_password(url: str) -> str:
    """The URL as it may be shown and kept."""
    parts = urlsplit(url)
    return url.replace(f"{parts.netloc.rpartition('@')[0]}@", "", 1) if "@" in parts.netloc else url


def require_url(url: str) -> None:
    """Raises BadSetting for what is no address of a server."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        sound = False
    if not sound:
        raise BadSetting(f"--url {url!r}", "is no address of a server", "Write http://HOST:PORT.")
