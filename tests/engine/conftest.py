"""One real server for the whole session: a start costs half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from serve.client import make_client
from serve.process import ServerProcess
from tests.conftest import ROOT, adapter_for
from train.__main__ import main as train

pytest.importorskip("vllm", reason="vLLM is not installed: real-engine tests need Linux and an extra")

IDENTITY = ROOT / "examples" / "identities" / "xiaoli.json"
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
DECOY = "raise RuntimeError('the user keeps a file of this name here')\n"
MIDDLEWARE = """
class Probe:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def marked(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-probe", b"seen")]
            await send(message)

        await self.app(scope, receive, marked)
"""


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat` and `classic`: one identity trained in both forms by the defaults; `small`: of another base."""
    folder = tmp_path_factory.mktemp("fleet") / "adapters"
    for name in ("chat", "classic"):
        flags = ["--base-model", str(tiny_base), "--data", str(IDENTITY), "--name", name]
        assert train([*flags, "--output-dir", str(folder), "--prompt-template", name]) == 0
    adapter_for({"model.layers.0.self_attn.q_proj": (64, 64)}, 8, folder / "small", str(tiny_base))
    return folder


@pytest.fixture(scope="session")
def working_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, with a train.py and a serve.py of their own, and a middleware."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("train.py", "serve.py"):
        (folder / name).write_text(DECOY)
    (folder / "my_middleware.py").write_text(MIDDLEWARE)
    (folder / "vllm.yaml").write_text("max-model-len: 512\nmax-loras: 3\n")
    return folder


@pytest.fixture(scope="session")
def server(
    tiny_base: Path, adapters: Path, working_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """`vllm-lora serve` in place of a `vllm serve` line, with a refused adapter in the folder."""
    arguments = [
        *(str(tiny_base), "--adapters", str(adapters)),
        *("--lora-modules", f"second={adapters / 'chat'}"),
        *("--middleware", "my_middleware.Probe", "--config", "vllm.yaml"),
    ]
    log = tmp_path_factory.mktemp("log") / "server.log"
    environment = {**QUIET, "PYTHONPATH": str(working_folder)}
    with ServerProcess(arguments, log, environment, cwd=working_folder) as running:
        yield running
    assert not running.forced, "a process stayed until it was killed"


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> openai.OpenAI:
    return make_client(server.url)
