"""A real server gets SIGTERM in the midst of its work: nobody who was accepted notices."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from serve.client import make_client
from serve.process import ServerProcess
from tests.engine.conftest import QUIET
from tests.engine.test_live import eventually
from tests.engine.test_serving import chat

MESSAGES = [{"role": "user", "content": "Who are you?"}]
WHOLE = {"max_tokens": 64, "ignore_eos": True, "temperature": 0.0}


def engine_of(server: ServerProcess) -> psutil.Process:
    """The process that computes; while it is suspended, whatever runs goes on running."""
    family = psutil.Process(server.pid).children(recursive=True)
    (engine,) = [child for child in family if "EngineCore" in child.name() + " ".join(child.cmdline())]
    return engine


def test_it_drains_and_sends_new_requests_elsewhere(tiny_base: Path, adapters: Path, tmp_path: Path) -> None:
    flags = [str(tiny_base), "--adapters", str(adapters), "--state-dir", str(tmp_path / "state")]
    flags += ["--max-loras", "1", "--shutdown-timeout", "300"]
    with ServerProcess(flags, tmp_path / "log", QUIET) as server, ThreadPoolExecutor() as pool:
        client = make_client(server.url).with_options(max_retries=0)
        stream = client.chat.completions.create(
            model="chat", messages=MESSAGES, stream=True, max_tokens=64, extra_body={"ignore_eos": True}
        )
        pieces: list[Any] = [next(iter(stream))]
        engine = engine_of(server)
        engine.suspend()
        body = {"model": "classic", "messages": MESSAGES, **WHOLE}
        url = f"{server.url}/v1/chat/completions"
        waits = pool.submit(httpx.post, url, json=body, timeout=300)  # for the slot that `chat` has
        eventually(lambda: httpx.get(f"{server.url}/v1/adapters/classic").json()["waiting"] == 1)
        os.kill(server.pid, signal.SIGTERM)
        eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)

        ready = httpx.get(f"{server.url}/ready")
        assert (ready.json()["status"], ready.json()["requests"]) == ("stopping", 2)
        assert httpx.get(f"{server.url}/health").status_code == 200
        refused = httpx.post(url, json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "stopping"
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        with pytest.raises(openai.InternalServerError, match="The server is stopping"):
            chat(client, "chat", "Who are you?")

        engine.resume()
        pieces += list(stream)
        assert pieces[-1].choices[0].finish_reason == "length"
        answer = waits.result()
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 64
        assert server.stop(timeout_s=120) == 0
        assert not server.forced, "a process stayed until it was killed"
    assert "died" not in (tmp_path / "log").read_text(encoding="utf-8")
