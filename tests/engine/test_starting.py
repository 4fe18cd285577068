"""Starting and stopping: what is refused before the engine loads, other ways to start, and a clean end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import openai
import pytest

from serve.process import SERVE, ServerProcess
from tests.conftest import adapter_for
from tests.engine.conftest import QUIET
from train.merge import merge
from vllm_lora_ext.base_model import read_base_model

PLAIN_VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


def ask(url: str, model: str) -> str:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Who are you?"}], temperature=0.0
    )
    return answer.choices[0].message.content or ""


def refused(*arguments: str) -> str:
    """What a start that ends with exit code 2 says."""
    done = subprocess.run([*SERVE, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_ends_the_start_at_once(adapters: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port}" in refused("--adapters", str(adapters), "--port", port)


def test_strict_refuses_to_start_with_a_refused_adapter(adapters: Path) -> None:
    assert "shape_mismatch" in refused("--adapters", str(adapters), "--strict")


def test_a_merged_model_is_served_with_no_adapter_and_answers_as_the_adapter_did(
    adapters: Path, tmp_path: Path
) -> None:
    merge(adapters / "classic", None, tmp_path / "merged")
    (tmp_path / "none yet").mkdir()
    arguments = ["--base-model", str(tmp_path / "merged"), "--adapters", str(tmp_path / "none yet")]
    with ServerProcess(arguments, tmp_path / "log", QUIET) as server:
        assert "no adapter in" in server.log.read_text(encoding="utf-8")
        assert "小李" in ask(server.url, "merged")
        assert server.stop(signal.SIGINT) == 0  # Ctrl+C
        assert server.is_gone(), "a process was left behind"


def test_plain_vllm_with_our_plugin_serves_adapters_by_their_own_template(
    tiny_base: Path, adapters: Path, working_folder: Path, tmp_path: Path
) -> None:
    shapes = read_base_model(str(tiny_base)).module_shapes()
    assert shapes is not None
    large = adapter_for(shapes, 64, tmp_path / "large", str(tiny_base))
    arguments = [
        *("--model", str(tiny_base), "--host", "127.0.0.1", "--enable-lora"),
        *("--lora-modules", f"classic={adapters / 'classic'}", f"large={large}"),
    ]
    environment = {**QUIET, "VLLM_PLUGINS": "vllm_lora", "PYTHONPATH": str(working_folder)}
    environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
    log = tmp_path / "log"
    with ServerProcess(arguments, log, environment, cwd=working_folder, command=PLAIN_VLLM) as server:
        assert httpx.get(f"{server.url}/ready").json()["adapters"] == ["classic"]
        assert "--max-lora-rank 64" in log.read_text(encoding="utf-8")
        assert "小李" in ask(server.url, "classic")
        with pytest.raises(openai.NotFoundError):
            ask(server.url, "large")
        server.stop()
        assert server.is_gone(), "a process was left behind"
