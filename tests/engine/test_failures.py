"""An adapter that fails, seen by clients; and what ends a server that must not serve."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from serve.client import make_client
from serve.process import ServerProcess
from tests.conftest import ROOT, adapter_for
from tests.engine.conftest import QUIET
from tests.engine.test_serving import BASE, chat
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import ServerFailed
from vllm_lora_ext.intake import admit
from vllm_lora_ext.store import AdapterStore

DAMAGES = ("flipped", "cut", "gone")


def variant(adapter: Path, folder: Path, alpha: int) -> Path:
    """The same adapter a little stronger or weaker, so that it is a version of its own."""
    shutil.copytree(adapter, folder)
    (folder / "identity.json").unlink()  # it vouches for the files as they were
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": alpha}))
    return folder


@pytest.fixture(scope="module")
def fleet(tiny_base: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat` and some much like it; `slow-to-read` takes longer to read than the engine to start."""
    folder = tmp_path_factory.mktemp("fleet")
    shutil.copytree(adapters / "chat", folder / "chat")
    for alpha, name in enumerate(DAMAGES, 29):
        variant(adapters / "chat", folder / name, alpha)
    shapes = read_base_model(str(tiny_base)).module_shapes()
    assert shapes is not None
    adapter_for(shapes, 96, folder / "slow-to-read", str(tiny_base))
    return folder


@pytest.fixture(scope="module")
def slow(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An adapter, and the digest of its version: wherever it lies in a store, it is read at 150 kB/s."""
    folder = variant(adapters / "chat", tmp_path_factory.mktemp("slow") / "slow", 33)
    return folder, admit(folder, AdapterStore(folder.parent / "store")).version.digest


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def cramped(
    tiny_base: Path,
    fleet: Path,
    slow: tuple[Path, str],
    state_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerProcess]:
    """A server with room for one adapter, so that the other has to be read again."""
    room = ["--max-loras", "1", "--max-cpu-loras", "1", "--state-dir", str(state_dir), "--no-watch"]
    log = tmp_path_factory.mktemp("log") / "cramped.log"
    slow_disk = {
        "PYTHONPATH": str(ROOT / "benchmarks" / "throttle"),
        "BENCH_READ_LIMIT": "150000",  # 8 s for an adapter of 1.2 MB, 47 s for one of 7 MB
        "BENCH_READ_MATCH": f"{slow[1]},slow-to-read",
    }
    environment = {**QUIET, **slow_disk}
    with ServerProcess([str(tiny_base), "--adapters", str(fleet), *room], log, environment) as running:
        yield running


def test_a_large_folder_does_not_hold_up_readiness(cramped: ServerProcess) -> None:
    """Runs first: the adapter is still being read when the server is ready, and is served later."""
    ready = httpx.get(f"{cramped.url}/ready").json()
    assert ready["adapters"] == ["chat", *sorted(DAMAGES)]
    deadline = time.monotonic() + 300
    while "slow-to-read" not in httpx.get(f"{cramped.url}/ready").json()["adapters"]:
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.5)
    client = make_client(cramped.url)
    assert chat(client, "slow-to-read", "Who are you?") == chat(client, BASE, "Who are you?"), (
        "its weights are 0"
    )


def test_nobody_notices_what_happens_to_the_source(cramped: ServerProcess, fleet: Path) -> None:
    client = make_client(cramped.url)
    assert "小李" in chat(client, "chat", "Who are you?")  # `gone` left the memory
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (fleet / "gone" / name).write_bytes(b"")  # cut short in place
    assert "小李" in chat(client, "gone", "Who are you?")
    shutil.rmtree(fleet / "chat")
    assert "小李" in chat(client, "chat", "Who are you?")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_version_ends_its_own_requests_with_the_reason(
    damage: str, stream: bool, cramped: ServerProcess, state_dir: Path
) -> None:
    client = make_client(cramped.url)
    alone = chat(client, BASE, "Who are you?")
    assert "小李" in chat(client, "chat", "Who are you?")  # the other left the memory
    digest = Catalog(state_dir, readonly=True).entry(damage).live
    weights = state_dir / "store" / digest / "adapter_model.safetensors"
    is_first = weights.exists() and weights.stat().st_mode & 0o200 == 0
    if is_first:
        weights.chmod(0o644)
        data = bytearray(weights.read_bytes())
        data[-3] ^= 0x40
        weights.write_bytes(data if damage == "flipped" else data[:-100])
        if damage == "gone":
            weights.parent.chmod(0o755)
            shutil.rmtree(weights.parent)
    with pytest.raises(openai.APIError) as failure:
        answer = client.chat.completions.create(
            model=damage, messages=[{"role": "user", "content": "Who are you?"}], stream=stream
        )
        assert [chunk.choices[0].delta.content for chunk in answer] in ([], [""], [None])
    reason = "is not in the store" if damage == "gone" else "could not be loaded"
    assert reason in str(failure.value) or "was refused" in str(failure.value)
    assert str(state_dir) not in str(failure.value), "no path of the server's machine"
    assert isinstance(failure.value, openai.NotFoundError) is not is_first, "what failed is told for a while"
    assert chat(client, BASE, "Who are you?") == alone
    assert "小李" in chat(client, "chat", "Who are you?")


def test_an_adapter_loaded_at_run_time_serves_and_a_broken_one_is_answered(
    cramped: ServerProcess, adapters: Path, fleet: Path, tmp_path: Path
) -> None:
    late = shutil.copytree(adapters / "chat", fleet / "later" / "late")
    broken = shutil.copytree(adapters / "chat", fleet / "later" / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    outside = shutil.copytree(adapters / "chat", tmp_path / "outside")
    for name, folder, status in (("late", late, 200), ("broken", broken, 400), ("outside", outside, 400)):
        body = {"lora_name": name, "lora_path": str(folder)}
        assert httpx.post(f"{cramped.url}/v1/load_lora_adapter", json=body).status_code == status
    client = make_client(cramped.url)
    assert "小李" in chat(client, "late", "Who are you?")
    for name in ("broken", "outside"):
        with pytest.raises(openai.NotFoundError):
            chat(client, name, "Who are you?")


def test_nobody_waits_for_a_slow_disk(cramped: ServerProcess, fleet: Path, slow: tuple[Path, str]) -> None:
    client = make_client(cramped.url)
    body = {"lora_name": "slow", "lora_path": str(shutil.copytree(slow[0], fleet / "later" / "slow"))}
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(httpx.post, f"{cramped.url}/v1/load_lora_adapter", json=body, timeout=120)
        answers = 0
        while not load.done():
            chat(client, BASE, "Who are you?")
            answers += 1
    assert load.result().status_code == 200
    assert load.result().elapsed.total_seconds() > 5, "it was not read slowly"
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
