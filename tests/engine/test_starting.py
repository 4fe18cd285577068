"""Starting and stopping: what is refused before the engine loads, other ways to start, and a clean end."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from serve.client import make_client
from serve.launch import infer_on_cpu
from serve.process import SERVE, ServerProcess
from tests.conftest import adapter_for
from tests.engine.conftest import QUIET
from tests.engine.test_serving import chat
from train.merge import merge
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import ServerFailed

PLAIN_VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")


def ask(url: str, model: str, question: str = "Who are you?") -> str:
    return chat(make_client(url), model, question)


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


def test_stated_memory_says_nothing_about_compilation(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is too small to be compiled is, with VLLM_CPU_KVCACHE_SPACE as without it."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("both are inferred on the CPU only")
    for stated, inferred in (("1", {"enforce_eager"}), ("", {"enforce_eager", "kv_cache_memory_bytes"})):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", stated)
        assert {item.name for item in infer_on_cpu(str(tiny_base), {})} == inferred


def test_strict_refuses_to_start_with_a_refused_adapter(adapters: Path, tmp_path: Path) -> None:
    state = ["--state-dir", str(tmp_path / "state")]
    assert "shape_mismatch" in refused("--adapters", str(adapters), "--strict", *state)


def test_a_second_server_on_the_same_state_is_refused_at_once(adapters: Path, tmp_path: Path) -> None:
    with Catalog(tmp_path / "state"):
        message = refused("--adapters", str(adapters), "--state-dir", str(tmp_path / "state"))
    assert "in use by process" in message and "--state-dir" in message


def test_a_merged_model_is_served_with_no_adapter_and_answers_as_the_adapter_did(
    adapters: Path, client: openai.OpenAI, tmp_path: Path
) -> None:
    merge(adapters / "classic", None, tmp_path / "merged")
    (tmp_path / "none yet").mkdir()
    arguments = ["--base-model", str(tmp_path / "merged"), "--adapters", str(tmp_path / "none yet")]
    question = "Who are you?"
    with ServerProcess(arguments, tmp_path / "log", QUIET) as server:
        assert "no adapter in" in server.log.read_text(encoding="utf-8")
        assert ask(server.url, "merged", question) == chat(client, "classic", question)
        assert server.stop(signal.SIGINT) == 0  # Ctrl+C
        assert not server.forced, "a process stayed until it was killed"


def test_a_server_whose_engine_dies_ends_with_a_failure(tiny_base: Path, tmp_path: Path) -> None:
    with ServerProcess([str(tiny_base)], tmp_path / "log", QUIET) as server:
        family = psutil.Process(server.pid).children(recursive=True)
        (engine,) = [child for child in family if "EngineCore" in child.name() + " ".join(child.cmdline())]
        engine.kill()
        deadline = time.monotonic() + 60
        while not server.is_gone() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert server.stop() == 1
        assert not server.forced
        assert "the engine: died while it served" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_server_is_stopped_while_it_starts(adapters: Path, tmp_path: Path) -> None:
    arguments = ["--adapters", str(adapters), "--state-dir", str(tmp_path / "state")]
    server = ServerProcess(arguments, tmp_path / "log", QUIET, ready_timeout_s=15)
    with pytest.raises(ServerFailed, match="not ready after 15 s"), server:
        pass
    assert server.is_gone()
    assert not server.forced


def test_plain_vllm_with_our_plugin_serves_adapters_by_their_own_template(
    tiny_base: Path, adapters: Path, working_folder: Path, tmp_path: Path
) -> None:
    shapes = read_base_model(str(tiny_base)).module_shapes()
    assert shapes is not None
    large = adapter_for(shapes, 64, tmp_path / "large", str(tiny_base))
    stated = tmp_path / "stated.jinja"
    stated.write_text("{{ 'Say the name Anna' }}{{ messages and '' }}")
    foreign = tmp_path / "foreign"  # a template that nobody vouches for
    shutil.copytree(adapters / "classic", foreign)
    (foreign / "identity.json").unlink()
    arguments = [
        *("--model", str(tiny_base), "--host", "127.0.0.1", "--enable-lora", "--enforce-eager"),
        *("--chat-template", str(stated), "--max-loras", "2"),
        *("--lora-modules", f"classic={adapters / 'classic'}", f"large={large}", f"foreign={foreign}"),
    ]
    environment = {**QUIET, "VLLM_PLUGINS": "vllm_lora", "PYTHONPATH": str(working_folder)}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    log = tmp_path / "log"
    with ServerProcess(arguments, log, environment, cwd=working_folder, command=PLAIN_VLLM) as server:
        assert httpx.get(f"{server.url}/ready").json()["adapters"] == ["classic", "foreign"]
        assert "--max-lora-rank 64" in log.read_text(encoding="utf-8")
        with pytest.raises(openai.NotFoundError):
            ask(server.url, "large")
        assert "小李" in ask(server.url, "classic"), "its trained template wins over the stated one"
        assert rendered(server.url, str(tiny_base)) == "Say the name Anna"
        assert rendered(server.url, "foreign") == "Say the name Anna"
        assert rendered(server.url, "classic") == "Human: Who are you?\n\nAssistant: "

        later = {"lora_name": "later", "lora_path": str(adapters / "classic")}
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=later, timeout=60).is_success
        assert rendered(server.url, "later") == "Human: Who are you?\n\nAssistant: "
        refusal = httpx.post(
            f"{server.url}/v1/load_lora_adapter", json={"lora_name": "large", "lora_path": str(large)}
        )
        assert refusal.status_code == 400
        assert "--max-lora-rank 64" in refusal.text
        server.stop()
        assert not server.forced, "a process stayed until it was killed"


def rendered(url: str, model: str) -> str:
    """The prompt that the server makes of a question."""
    body = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}]}
    tokens = httpx.post(f"{url}/tokenize", json=body).json()["tokens"]
    text: str = httpx.post(f"{url}/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"]
    return text
