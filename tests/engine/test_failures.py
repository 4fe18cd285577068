"""An adapter that fails, seen by clients; and what ends a server that must not serve."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from serve.client import make_client
from serve.process import ServerProcess
from tests.conftest import ROOT
from tests.engine.conftest import QUIET
from tests.engine.test_serving import BASE, chat
from vllm_lora_ext.errors import ServerFailed

RUNTIME = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
# Files below a folder of this name are read at 150 kB/s: 8 s for an adapter of 1.2 MB.
SLOW_DISK = {"PYTHONPATH": str(ROOT / "benchmarks" / "throttle"), "BENCH_READ_LIMIT": "150000"}


@pytest.fixture(scope="module")
def fleet(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat` and `lost`, copies of one adapter."""
    folder = tmp_path_factory.mktemp("fleet")
    for name in ("chat", "lost"):
        shutil.copytree(adapters / "chat", folder / name)
    return folder


@pytest.fixture(scope="module")
def cramped(
    tiny_base: Path, fleet: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with room for one adapter, so that the other has to be read again."""
    room = ["--max-loras", "1", "--max-cpu-loras", "1"]
    log = tmp_path_factory.mktemp("log") / "cramped.log"
    environment = {**QUIET, **RUNTIME, **SLOW_DISK}
    with ServerProcess([str(tiny_base), "--adapters", str(fleet), *room], log, environment) as running:
        yield running


def test_a_lost_adapter_ends_its_own_requests_with_the_reason(cramped: ServerProcess, fleet: Path) -> None:
    client = make_client(cramped.url)
    alone = chat(client, BASE, "Who are you?")
    assert "小李" in chat(client, "chat", "Who are you?")  # `lost` left the memory
    shutil.rmtree(fleet / "lost")
    with pytest.raises(openai.InternalServerError) as whole:
        chat(client, "lost", "Who are you?")
    assert "adapter lost could not be used" in str(whole.value)
    assert str(fleet) not in str(whole.value), "no path of the server's machine"
    stream = client.chat.completions.create(
        model="lost", messages=[{"role": "user", "content": "Who are you?"}], stream=True
    )
    with pytest.raises(openai.APIError, match="adapter lost could not be used"):
        assert [chunk.choices[0].delta.content for chunk in stream] in ([], [""], [None])
    assert chat(client, BASE, "Who are you?") == alone
    assert "小李" in chat(client, "chat", "Who are you?")


def test_an_adapter_loaded_at_run_time_serves_and_a_broken_one_is_answered(
    cramped: ServerProcess, adapters: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(adapters / "chat", tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name, folder, status in (("late", adapters / "chat", 200), ("broken", broken, 400)):
        body = {"lora_name": name, "lora_path": str(folder)}
        assert httpx.post(f"{cramped.url}/v1/load_lora_adapter", json=body).status_code == status
    client = make_client(cramped.url)
    assert "小李" in chat(client, "late", "Who are you?")
    with pytest.raises(openai.NotFoundError):
        chat(client, "broken", "Who are you?")


def test_nobody_waits_for_a_slow_disk(cramped: ServerProcess, adapters: Path, tmp_path: Path) -> None:
    slow = shutil.copytree(adapters / "chat", tmp_path / "throttled" / "slow")
    client = make_client(cramped.url)
    body = {"lora_name": "slow", "lora_path": str(slow)}
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(httpx.post, f"{cramped.url}/v1/load_lora_adapter", json=body, timeout=120)
        answers = 0
        while not load.done():
            chat(client, BASE, "Who are you?")
            answers += 1
    assert load.result().status_code == 200
    assert answers > 5, "requests waited for the load"
    assert "小李" in chat(client, "slow", "Who are you?")


def test_the_isolation_check_ran_before_the_server_was_ready(cramped: ServerProcess) -> None:
    log = cramped.log.read_text(encoding="utf-8")
    assert log.index("adapters and base do not mix") < log.index("Ready with base model")


def test_a_server_whose_endpoint_cannot_be_loaded_is_stopped(tiny_base: Path, tmp_path: Path) -> None:
    """vLLM logs that and goes on; nothing would guard the adapters."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['serve.endpoint'] = None\n")
    environment = {**QUIET, "PYTHONPATH": str(tmp_path)}
    server = ServerProcess([str(tiny_base)], tmp_path / "server.log", environment, ready_timeout_s=180)
    with pytest.raises(ServerFailed, match="ended with exit code 1"), server:
        pytest.fail("it serves")
    assert "runs without our endpoint" in server.log.read_text(encoding="utf-8")


def test_a_vllm_without_what_keeps_adapters_apart_ends_the_process() -> None:
    script = """
from vllm.lora.worker_manager import WorkerLoRAManager
del WorkerLoRAManager.set_active_adapters
from vllm.plugins import load_general_plugins
load_general_plugins()
print("goes on")
"""
    environment = {**QUIET, "VLLM_PLUGINS": "vllm_lora"}
    for skip, code in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**environment, "LORA_EXT_UNSAFE_SKIP_COMPAT": skip, "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert ("goes on" in done.stdout) is (skip == "1")
        assert "set_active_adapters" in done.stderr + done.stdout
