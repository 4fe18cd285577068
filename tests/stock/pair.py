"""The same server twice: plain `vllm serve`, and ours with the same settings, adapters and key."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from serve.process import SERVE, ServerProcess

PLAIN_VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--enable-lora")
KINDS = ("stock", "ours")
BASE = "base"
KEY = "open-sesame"
QUESTION = "Who are you?"
SLOTS, CACHED, SEQUENCES = 1, 2, 4
_SETTINGS = {
    "served-model-name": BASE,
    "host": "127.0.0.1",
    "api-key": KEY,
    "max-loras": SLOTS,
    "max-cpu-loras": CACHED,
    "max-num-seqs": SEQUENCES,
}
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
_PATIENCE_S = 120.0
_START_S = 480.0  # two at once, on a machine that may have other work


@dataclass
class Answer:
    """Of any route: `body` is what JSON says, or the text."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> object:
        """OpenAI's `error.code`."""
        return self.body["error"]["code"]


@dataclass
class Server:
    """One of the two."""

    kind: str
    process: ServerProcess

    @property
    def url(self) -> str:
        return self.process.url

    def send(
        self,
        method: str,
        path: str,
        body: object = None,
        key: str | None = KEY,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """A request whose path goes out as it is written."""
        connection = http.client.HTTPConnection("127.0.0.1", self.process.port, timeout=_PATIENCE_S)
        sent = {"Content-Type": "application/json", **(headers or {})}
        if key is not None:
            sent["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), sent)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            content = json.loads(text)
        except ValueError:
            content = text
        return Answer(
            response.status, content, {name.lower(): value for name, value in response.getheaders()}
        )

    def complete(self, model: str, prompt: str | list[int] = QUESTION, **more: object) -> Answer:
        body = {"model": model, "prompt": prompt, "temperature": 0.0, "max_tokens": 12, **more}
        return self.send("POST", "/v1/completions", body)

    def text(self, model: str, prompt: str | list[int] = QUESTION, **more: object) -> str:
        """A greedy completion."""
        answer = self.complete(model, prompt, **more)
        assert answer.status == httpx.codes.OK, answer.body
        found: str = answer.body["choices"][0]["text"]
        return found

    def chat(self, model: str | None, content: object = QUESTION, key: str | None = KEY) -> Answer:
        """A greedy chat; without `model` the body has none."""
        return self.send("POST", "/v1/chat/completions", chat_body(model, content), key)

    def load(self, name: str, folder: Path, in_place: bool = False) -> Answer:
        body = {"lora_name": name, "lora_path": str(folder), "load_inplace": in_place}
        return self.send("POST", "/v1/load_lora_adapter", body)

    def unload(self, name: str) -> Answer:
        return self.send("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def models(self) -> set[str]:
        return {card["id"] for card in self.send("GET", "/v1/models").body["data"]}

    def samples(self) -> list[Sample]:
        """All of `/metrics`."""
        families = text_string_to_metric_families(self.send("GET", "/metrics").body)
        return [sample for family in families for sample in family.samples]


def chat_body(model: str | None, content: object = QUESTION) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0.0, "max_tokens": 32}
    return body if model is None else {"model": model, **body}


def said(answer: Answer) -> str:
    """What a chat was answered."""
    assert answer.status == httpx.codes.OK, answer.body
    found: str = answer.body["choices"][0]["message"]["content"]
    return found


class Pair:
    """Both servers, started and started again together; `ours` keeps its state in a folder."""

    def __init__(self, base: Path, modules: Sequence[str], own_flags: Sequence[str], folder: Path) -> None:
        settings = [word for name, value in _SETTINGS.items() for word in (f"--{name}", str(value))]
        settings += ["--lora-modules", *modules]
        self._arguments = {
            "stock": ["--model", str(base), *settings],
            "ours": [str(base), *settings, "--state-dir", str(folder / "state"), *own_flags],
        }
        self._folder = folder
        self._servers: dict[str, Server] = {}

    def __getitem__(self, kind: str) -> Server:
        return self._servers[kind]

    def start(self) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(self._start, KINDS))

    def stop(self) -> None:
        with ThreadPoolExecutor() as threads:
            list(threads.map(lambda server: server.process.stop(), self._servers.values()))
        self._servers.clear()

    def _start(self, kind: str) -> None:
        environment = dict(_ENVIRONMENT)
        if kind == "stock":
            environment |= {"VLLM_PLUGINS": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        process = ServerProcess(
            self._arguments[kind],
            self._folder / f"{kind}.log",
            environment,
            ready_timeout_s=_START_S,
            command=SERVE if kind == "ours" else PLAIN_VLLM,
            ready_path="/ready" if kind == "ours" else "/health",
        )
        self._servers[kind] = Server(kind, process.__enter__())
