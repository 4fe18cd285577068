"""The adapters of a running server, over its HTTP interface."""

from __future__ import annotations

import json
import ssl
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from serve.adapter_view import read_findings
from serve.client import endpoint, require_url, uses_proxy, without_password
from vllm_lora_ext.archive import pack
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import (
    AdapterExists,
    AdapterRefused,
    AdapterUnknown,
    BadSetting,
    ServerFailed,
    ServerUnreachable,
    VllmLoraError,
)
from vllm_lora_ext.inspection import inspect_adapter, require_admitted
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.peft_format import WEIGHTS_FILE
from vllm_lora_ext.sources import AdapterSource, fetched
from vllm_lora_ext.spec import printable

_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)
_PUBLISH_TIMEOUT = httpx2.Timeout(60.0, connect=10.0, read=600.0)  # the answer comes once it is judged
_BAD_INPUT = (400, 409, 411, 413, 415, 422)
_IS_IT = "Is it a vllm-lora server?"


class ServerAdapters:
    """The adapters of the server at `url`; see `serve.versions.Adapters`.

    All methods raise:
        ServerUnreachable, ServerFailed: nobody answers, or not as a vllm-lora server does.
        BadSetting: the key is not the right one, or the server does not take a value.
        AdapterUnknown, AdapterRefused, AdapterExists: as the server says.
    """

    def __init__(self, url: str, admin_key: str | None = None) -> None:
        require_url(url)
        if admin_key and not (admin_key.isascii() and admin_key.isprintable() and " " not in admin_key):
            raise BadSetting(
                "--admin-key", "must be printable ASCII without spaces", "Check how it was copied."
            )
        self.url, self._adapters = without_password(url), f"{endpoint(url)}/adapters"
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {admin_key}"} if admin_key else {},
            timeout=_TIMEOUT,
            trust_env=uses_proxy(url),
            # to read the certificates of all authorities takes 30 ms, and plain HTTP has no use for any
            verify=True if url.lower().startswith("https:") else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        )

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()

    def list(self) -> Sequence[dict[str, Any]]:
        """All that the server knows."""
        found = self._ask("GET", self._adapters).get("data")
        if not isinstance(found, list) or not all(map(_is_adapter, found)):
            raise ServerFailed(self.url, "does not answer with adapters", _IS_IT)
        return found

    def get(self, name: str) -> dict[str, Any]:
        """One with its versions."""
        return self._adapter("GET", name)

    def publish(self, source: AdapterSource, replace: bool, chat: ChatOverride) -> dict[str, Any]:
        """Send an adapter's files; what lies elsewhere is fetched first."""
        headers = {"Content-Type": "application/x-tar"}
        if chat.digest:
            headers["X-Chat-Settings"] = json.dumps(chat.to_json())
        with tempfile.TemporaryDirectory() as scratch, fetched(source, Path(scratch)) as folder:
            if not (
                folder / WEIGHTS_FILE
            ).exists():  # then what is there would not travel, so it is told here
                require_admitted(inspect_adapter(folder, name=source.name))
            return self._adapter(
                "PUT",
                source.name,
                params={"replace": "true"} if replace else {},
                headers=headers,
                content=pack(folder),
                timeout=_PUBLISH_TIMEOUT,
            )

    def rollback(self, name: str, to: str | None) -> dict[str, Any]:
        """Make an earlier version live."""
        return self._adapter("POST", name, "/rollback", json={"to": to})

    def traffic(self, name: str, percent: Mapping[str, int]) -> dict[str, Any]:
        """Split the requests over versions."""
        return self._adapter("PUT", name, "/traffic", json={"traffic": dict(percent)})

    def remove(self, names: Collection[str]) -> Sequence[dict[str, Any]]:
        """Take names out of service; none of them if one is unknown."""
        for name in names:
            self.get(name)
        return [self._adapter("DELETE", name) for name in names]

    def _adapter(self, method: str, name: str, verb: str = "", **sent: Any) -> dict[str, Any]:
        if findings := judge_name(name):  # what is no name could lead to another route
            raise AdapterRefused(printable(name)[:80], findings)
        body = self._ask(method, f"{self._adapters}/{quote(name)}{verb}", name, **sent)
        if not _is_adapter(body):
            raise ServerFailed(self.url, "does not answer with an adapter", _IS_IT)
        return body

    def _ask(self, method: str, url: str, name: str = "", **sent: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, url, **sent)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            fix = "Start one with `vllm-lora serve`, or give --url."
            raise ServerUnreachable(self.url, "no server answers", fix) from error
        except httpx2.HTTPError as error:
            rule = f"gave no answer, or not a whole one ({type(error).__name__})"
            raise ServerFailed(self.url, rule, "`vllm-lora ls` shows what became of it.") from error
        try:
            body = answer.json()
        except (ValueError, RecursionError):
            body = None
        if answer.is_success and isinstance(body, dict):
            return body
        raise _error(f"{self.url} (HTTP {answer.status_code})", answer.status_code, body, name)


def _is_adapter(body: object) -> bool:
    return isinstance(body, dict) and body.get("object") == "adapter" and isinstance(body.get("id"), str)


def _error(item: str, status: int, body: object, name: str) -> VllmLoraError:
    """Our error for an answer that is none of what was asked for."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    if not isinstance(error, dict) or not isinstance(code, str):
        # Plain vLLM has error objects, too; their code is the status.
        return ServerFailed(item, "is not the answer of a vllm-lora server", _IS_IT)
    words = printable(str(error.get("message") or code)).rstrip(".")
    if findings := read_findings(error.get("findings")):
        kind = AdapterExists if status == httpx2.codes.CONFLICT else AdapterRefused
        return kind(name, findings)
    if status in (httpx2.codes.UNAUTHORIZED, httpx2.codes.FORBIDDEN):
        return BadSetting(item, words, "Here a key is given with --admin-key, or VLLM_LORA_ADMIN_KEY.")
    if status == httpx2.codes.NOT_FOUND and code == "adapter_unknown":
        return AdapterUnknown(item, words)
    if status in _BAD_INPUT:
        return BadSetting(item, words)
    return ServerFailed(item, words)
