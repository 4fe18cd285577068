"""What plain vLLM serves though nobody published it, or though it does not fit, and ours does not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import make_random_adapter
from serve.cli import main
from serve.process import ServerProcess
from tests.conftest import adapter_for
from tests.stock.conftest import MENDED

PLAIN_VLLM = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

Start = Callable[[str], ServerProcess]


@pytest.fixture(scope="module")
def places(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`served/inside` may be served; `outside/secret` lies beside the folder that is served."""
    folder = tmp_path_factory.mktemp("places")
    for number, name in enumerate(("served/inside", "outside/secret")):
        adapter = make_random_adapter(folder / name, tiny_base, 8, seed=number)
        weights = adapter / "adapter_model.safetensors"
        strong = {key: tensor.float() * 8 for key, tensor in load_file(weights).items()}
        weights.unlink()
        save_file(strong, weights)
    return folder


@pytest.fixture(scope="module")
def servers(tiny_base: Path, places: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The same server twice, with our plugin and without, each started when it is first asked for."""
    started: dict[str, ServerProcess] = {}
    arguments = ["--model", str(tiny_base), "--host", "127.0.0.1", "--enable-lora", "--enforce-eager"]

    def server(kind: str) -> ServerProcess:
        if kind not in started:
            environment = {
                **QUIET,
                "VLLM_PLUGINS": "lora_filesystem_resolver" + (",vllm_lora" if kind == "ours" else ""),
                "VLLM_LORA_RESOLVER_CACHE_DIR": str(places / "served"),
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            }
            log = tmp_path_factory.mktemp(kind) / "log"
            path = "/ready" if kind == "ours" else "/health"
            running = ServerProcess(arguments, log, environment, command=PLAIN_VLLM, ready_path=path)
            started[kind] = running.__enter__()
        return started[kind]

    yield server
    for running in started.values():
        running.__exit__(None, None, None)


def answer(server: ServerProcess, model: str) -> str | None:
    """A greedy answer of `model`; None if there is no such model."""
    body = {"model": model, "prompt": "Who are you?", "temperature": 0.0, "max_tokens": 12}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    if response.status_code in (400, 404):
        return None
    response.raise_for_status()
    text: str = response.json()["choices"][0]["text"]
    return text


def load(server: ServerProcess, name: str, folder: Path) -> httpx.Response:
    body = {"lora_name": name, "lora_path": str(folder)}
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_s5_a_name_reaches_only_what_is_served(
    kind: str, servers: Start, places: Path, tiny_base: Path
) -> None:
    server = servers(kind)
    base, inside = answer(server, str(tiny_base)), answer(server, "inside")
    assert inside not in (None, base), "what is in the folder is found by its name"
    for name in ("../outside/secret", str(places / "outside" / "secret")):
        if kind == "stock":
            assert answer(server, name) not in (None, base), MENDED
        else:
            assert answer(server, name) is None


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_s8_an_adapter_without_effect_is_not_served_as_if_it_had_one(
    kind: str, servers: Start, places: Path, tiny_base: Path
) -> None:
    """Its layers are not the base's, so none of its tensors is ever used."""
    server = servers(kind)
    folder = places / "served" / f"nothing-{kind}"
    shutil.copytree(places / "served" / "inside", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    beyond = {name.replace("layers.", "layers.4"): tensor for name, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").unlink()
    save_file(beyond, folder / "adapter_model.safetensors")
    response = load(server, "nothing", folder)
    if kind == "stock":
        assert response.is_success, MENDED
        assert answer(server, "nothing") == answer(server, str(tiny_base)), MENDED
    else:
        assert response.status_code == 400
        assert f"0 of {len(tensors)} tensors match" in response.text
        assert answer(server, "nothing") is None


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_s8_an_adapter_of_a_smaller_base_is_not_copied_into_a_corner(
    kind: str, servers: Start, places: Path, tiny_base: Path
) -> None:
    server = servers(kind)
    place = places / "served" / f"small-{kind}"
    folder = adapter_for({"model.layers.0.mlp.gate_proj": (64, 64)}, 8, place, str(tiny_base))
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    response = load(server, "small", folder)
    if kind == "stock":
        assert response.is_success, MENDED
    else:
        assert response.status_code == 400
        assert "shape_mismatch" in response.text


@pytest.mark.parametrize("kind", ["stock", "ours"])
def test_s1_the_load_test_tells_a_server_that_mixes_identities_from_one_that_does_not(
    kind: str,
    servers: Start,
    tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
    calm_client: Callable[[int, str], bool],
) -> None:
    flags = ["--models", str(tiny_base), "inside", "--num-prompts", "48", "--check", "--output-len", "16"]
    code = main(["loadtest", "--url", servers(kind).url, *flags])
    out = capsys.readouterr().out
    assert "48 answers compared" in out
    if kind == "stock":
        assert code == 1 and f"to {tiny_base} was answered as inside" in out, MENDED
    else:
        assert calm_client(code, out) and " 0 of a wrong identity" in out


def test_a_victim_s_streams_are_measured_while_others_are_loaded_and_unloaded(
    servers: Start, places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--victim", "inside", "--victim-load", str(places / "served" / "inside")]
    flags += ["--victim-rounds", "2", "--victim-window", "1.5", "--victim-streams", "2"]
    assert main(["loadtest", "--url", servers("ours").url, "--models", "inside", *flags]) == 0
    assert "1 folder loaded and unloaded in turn" in capsys.readouterr().out
