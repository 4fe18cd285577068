"""One real fleet for the whole session: Ray, and two replicas of the tiny base with real vLLM."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from serve.process import ServerProcess
from tests.conftest import adapter_for

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}
KEY, ADMIN = "key-of-a-client", "key-of-the-operator"
ADAPTERS = 12
CACHED = 6  # in memory of each replica: two hold all, one does not
START_S = 240.0


@pytest.fixture(scope="session", autouse=True)
def needed() -> None:
    """A fixture and not the module skips, which would be an error where this folder is named."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'vllm-lora[ray]'")
    pytest.importorskip("vllm", reason="vLLM is not installed: real-engine tests need Linux and an extra")


@dataclass(frozen=True)
class Child:
    """The server of one replica, and the actor that started it."""

    pid: int
    actor_pid: int
    url: str


@dataclass(frozen=True)
class Fleet:
    """A running fleet; all its folders are in `folder`, which tells its processes from those of others."""

    server: ServerProcess
    folder: Path

    @property
    def adapters(self) -> Path:
        """The folder that it watches."""
        return self.folder / "adapters"

    @property
    def copies(self) -> Path:
        """Where its replicas keep copies, if they do: a folder each."""
        return self.folder / "copies"

    @property
    def url(self) -> str:
        """Its one address."""
        return self.server.url

    def children(self) -> list[Child]:
        """The servers of its replicas that run now."""
        found = []
        for process in psutil.process_iter(["cmdline", "status", "ppid"]):
            words = process.info["cmdline"] or []
            if "serve.scaleout.child" in words and any(word.startswith(f"{self.folder}/") for word in words):
                port = words[words.index("--port") + 1]
                found.append(Child(process.pid, process.info["ppid"], f"http://127.0.0.1:{port}"))
        return found

    def client(self, key: str = ADMIN) -> httpx2.Client:
        """An HTTP client of it; with a key for those that ask for one."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(base_url=self.url, timeout=60.0, trust_env=False, headers=headers)


def make_adapter(folder: Path, base: Path, seed: int, module: str = "q_proj") -> Path:
    """An adapter of the tiny base that changes its answers."""
    adapter_for({f"model.layers.0.self_attn.{module}": (256, 256)}, 8, folder, str(base))
    chance = np.random.default_rng(seed)
    shapes = {name: tensor.shape for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    tensors = {name: (chance.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@contextmanager
def running_fleet(
    base: Path, folder: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Fleet]:
    """A fleet with `ADAPTERS` adapters, from the command line; gone afterwards, with all its processes."""
    adapters, state_dir = folder / "adapters", folder / "state"
    temporary = Path(tempfile.mkdtemp(prefix="fleet-"))  # short, since there are sockets in it
    for number in range(ADAPTERS):
        make_adapter(adapters / f"a{number:02}", base, number)
    arguments = [
        *(str(base), "--adapters", str(adapters), "--state-dir", str(state_dir), *flags),
        *("--max-model-len", "512", "--enforce-eager", "--max-loras", "4", "--max-cpu-loras", str(CACHED)),
        *("--lora-target-modules", "q_proj"),  # so that there are adapters which the engine cannot load
    ]
    environment = {**ENVIRONMENT, "TMPDIR": str(temporary), **(environment or {})}
    with ServerProcess(arguments, folder / "fleet.log", environment, START_S, cwd=folder) as running:
        fleet = Fleet(running, folder)
        yield fleet
    assert not running.forced, "a process stayed until it was killed"
    assert not fleet.children()
    assert not list(temporary.glob("vllm-lora-*")), "folders of replicas and gateways go with them"
    shutil.rmtree(temporary)


@pytest.fixture(scope="session")
def fleet(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Each of its replicas has a folder of its own, as on a machine of its own."""
    folder = tmp_path_factory.mktemp("fleet")
    with running_fleet(
        tiny_base, folder, "--replicas", "2", "--replica-state-dir", str(folder / "copies")
    ) as fleet:
        wait_for(fleet, 2)
        yield fleet


def wait_for(fleet: Fleet, replicas: int) -> None:
    """Until so many replicas answer: a fleet is ready with the first."""
    with fleet.client() as client:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if client.get("/metrics").text.count("vllm_lora_adapter_load_seconds_count{") == replicas:
                return
            time.sleep(0.5)
    raise AssertionError(f"there are not {replicas} replicas")
