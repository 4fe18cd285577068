"""One real fleet for the whole session: Ray, and two replicas of the tiny base with real vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from serve.process import ServerProcess
from tests.conftest import ROOT, adapter_for

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vllm-lora[ray]'")
pytest.importorskip("vllm", reason="vLLM is not installed: real-engine tests need Linux and an extra")

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}
ADAPTERS = 12
CACHED = 6  # in memory of each replica: two hold all, one does not
START_S = 240.0


@dataclass(frozen=True)
class Child:
    """The server of one replica, and the actor that started it."""

    pid: int
    actor_pid: int
    url: str


@dataclass(frozen=True)
class Fleet:
    """A running fleet; `state_dir` tells its processes from those of others."""

    server: ServerProcess
    arguments: tuple[str, ...]
    adapters: Path
    state_dir: Path

    @property
    def url(self) -> str:
        """Its one address."""
        return self.server.url

    def children(self) -> list[Child]:
        """The servers of its replicas that run now."""
        found = []
        for process in psutil.process_iter(["cmdline", "status", "ppid"]):
            words = process.info["cmdline"] or []
            if "serve.scaleout.child" in words and str(self.state_dir) in words:
                port = words[words.index("--port") + 1]
                found.append(Child(process.pid, process.info["ppid"], f"http://127.0.0.1:{port}"))
        return found

    def scale(self, replicas: int) -> None:
        """Say anew how many replicas there should be, as a second `serve --ray-address auto` would."""
        script = str(ROOT / "tests" / "scaleout" / "scale.py")
        command = (sys.executable, "-P", script, str(replicas), *self.arguments)
        subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT}, timeout=120, cwd=ROOT)

    def client(self) -> httpx2.Client:
        """An HTTP client of it."""
        return httpx2.Client(base_url=self.url, timeout=60.0, trust_env=False)


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    """An adapter of the tiny base that changes its answers."""
    adapter_for({"model.layers.0.self_attn.q_proj": (256, 256)}, 8, folder, str(base))
    chance = np.random.default_rng(seed)
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    tensors = {name: (chance.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def fleet(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    adapters, state_dir = folder / "adapters", folder / "state"
    for number in range(ADAPTERS):
        make_adapter(adapters / f"a{number:02}", tiny_base, number)
    arguments = [
        *(str(tiny_base), "--adapters", str(adapters), "--state-dir", str(state_dir), "--replicas", "2"),
        *("--max-model-len", "512", "--enforce-eager", "--max-loras", "4", "--max-cpu-loras", str(CACHED)),
    ]
    with ServerProcess(arguments, folder / "fleet.log", ENVIRONMENT, START_S, cwd=folder) as running:
        fleet = Fleet(running, (*arguments, "--port", str(running.port)), adapters, state_dir)
        _wait_for_two(fleet)
        yield fleet
    assert not running.forced, "a process stayed until it was killed"
    assert not fleet.children()


def _wait_for_two(fleet: Fleet) -> None:
    """The first replica makes a fleet ready; the tests need both."""
    with fleet.client() as client:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            page = client.get("/metrics").text
            if page.count("vllm_lora_adapter_load_seconds_count{") >= 2:
                return
            time.sleep(0.5)
    raise AssertionError("the second replica did not come")
