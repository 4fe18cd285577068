"""Proofs on real vLLM: what does here what it did in training goes live, and nothing else does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import load_file, save_file

from serve.cli import main
from serve.client import make_client
from serve.process import ServerProcess
from tests.engine.conftest import IDENTITY, QUIET
from tests.engine.test_live import eventually
from tests.engine.test_serving import chat
from train.__main__ import main as train

QUESTION = "Who are you?"


def changed(adapter: Path, folder: Path, part: str, by: float) -> Path:
    """The same adapter with the tensors of `part` multiplied, in a folder that vouches for them."""
    shutil.copytree(adapter, folder)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert any(part in name for name in tensors)
    factors = {name: np.float32(by if part in name else 1) for name in tensors}
    save_file({name: tensor * factors[name] for name, tensor in tensors.items()}, weights)
    identity = json.loads((folder / "identity.json").read_text())
    (folder / "identity.json").write_text(json.dumps({**identity, "files": {}}))
    return folder


@pytest.fixture(scope="module")
def other_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights: of one shape and one name, so that nothing else tells them apart."""
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    folder = tmp_path_factory.mktemp("other") / tiny_base.name
    shutil.copytree(tiny_base, folder)
    tensors = load(folder / "model.safetensors")
    torch.manual_seed(0)
    noisy = {
        name: tensor + 0.05 * tensor.float().std() * torch.randn(tensor.shape)
        if tensor.dim() == 2
        else tensor
        for name, tensor in tensors.items()
    }
    like = {name: tensor.to(tensors[name].dtype) for name, tensor in noisy.items()}
    save(like, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def wrong(adapters: Path, other_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that no rule of admission refuses, and that do not do here what they did in training."""
    work = tmp_path_factory.mktemp("wrong")
    arguments = ["--base-model", str(other_base), "--data", str(IDENTITY), "--output-dir", str(work)]
    assert train([*arguments, "--name", "other", "--max-steps", "60"]) == 0
    changed(adapters / "chat", work / "silent", "lora_B", 1.01)
    identity = json.loads((work / "silent" / "identity.json").read_text())
    del identity["provenance"]["probes"]
    (work / "silent" / "identity.json").write_text(json.dumps(identity))
    return {
        "one module": changed(adapters / "chat", work / "module", "layers.1.mlp.down_proj.lora_A", 0.0),
        "nine tenths": changed(adapters / "chat", work / "tenths", "lora_B", 0.9),
        "zeroed": changed(adapters / "chat", work / "zeroed", "lora_B", 1e-9),
        "another base": work / "other",
        "no probes": work / "silent",
    }


REASONS = {
    "one module": "3 of 3 probes are scored differently from training",
    "nine tenths": "are scored differently from training",
    "zeroed": "has no effect",
    "another base": "it is not the base that was trained on",
    "no probes": "identity.json has no probes to replay",
}


@pytest.fixture(scope="module")
def fleet(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proved") / "adapters"
    shutil.copytree(adapters / "chat", folder / "good")
    return folder


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


def start(base: Path, fleet: Path, state: Path, log: str, *more: str) -> ServerProcess:
    arguments = [str(base), "--adapters", str(fleet), "--state-dir", str(state / "s"), *more]
    return ServerProcess([*arguments, "--max-model-len", "512"], state / log, QUIET)


@pytest.fixture(scope="module")
def strict(tiny_base: Path, fleet: Path, state: Path, wrong: dict[str, Path]) -> Iterator[ServerProcess]:
    """`wrong` is trained before: training and a server would take the cores from each other."""
    with start(tiny_base, fleet, state, "first.log", "--require-proof") as running:
        yield running


@pytest.fixture
def client(strict: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> openai.OpenAI:
    monkeypatch.setenv("VLLM_LORA_URL", strict.url)
    return make_client(strict.url)


def shown(server: ServerProcess, name: str) -> dict[str, Any]:
    return dict(httpx.get(f"{server.url}/v1/adapters/{name}").json())


def codes(server: ServerProcess, name: str) -> list[str]:
    return [finding["code"] for finding in shown(server, name).get("findings", [])]


def test_a_right_adapter_is_proven_before_it_goes_live_and_shown(
    client: openai.OpenAI, strict: ServerProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    eventually(lambda: "good" in {model.id for model in client.models.list()})
    adapter = shown(strict, "good")
    proof = adapter["proofs"]["parity"]
    assert adapter["proof"] == proof["verdict"] == "proven" and proof["digest"] == adapter["digest"]
    assert proof["probes"] == 3 and proof["largest"] < 0.25 and proof["effect"] > 1
    metrics = httpx.get(f"{strict.url}/metrics").text
    assert 'vllm_lora_requests_total{adapter="good"}' not in metrics, "a proof is nobody's request"
    assert main(["ls"]) == 0 and "proven" in capsys.readouterr().out
    assert main(["show", "good"]) == 0 and "proof: proven; 3 probes" in capsys.readouterr().out
    assert "小李" in chat(client, "good", QUESTION)


@pytest.mark.parametrize("what", REASONS)
def test_what_is_not_proven_leaves_the_live_version(
    what: str,
    wrong: dict[str, Path],
    client: openai.OpenAI,
    strict: ServerProcess,
    capsys: pytest.CaptureFixture[str],
) -> None:
    live, answer = shown(strict, "good"), chat(client, "good", QUESTION)
    assert main(["publish", str(wrong[what]), "--name", "good", "--replace"]) == 2
    told = capsys.readouterr().err
    assert "[proof_failed] good@" in told and REASONS[what] in told
    after = shown(strict, "good")
    assert after["digest"] == live["digest"] and len(after["versions"]) == len(live["versions"])
    assert chat(client, "good", QUESTION) == answer


def test_a_folder_that_fails_is_not_served_and_says_why(
    wrong: dict[str, Path], client: openai.OpenAI, fleet: Path, strict: ServerProcess
) -> None:
    live = shown(strict, "good")["digest"]
    shutil.copytree(wrong["one module"], fleet / "broken")
    shutil.rmtree(fleet / "good")
    shutil.copytree(wrong["nine tenths"], fleet / "good")
    for name in ("broken", "good"):
        eventually(lambda name=name: codes(strict, name) == ["proof_failed"])
    assert shown(strict, "good")["digest"] == live, "what was taken from it before is served"
    with pytest.raises(openai.NotFoundError, match="does not do here what it did in training"):
        chat(client, "broken", QUESTION)


def test_after_a_restart_nothing_is_proved_twice_and_without_the_flag_a_failure_is_only_shown(
    tiny_base: Path, adapters: Path, fleet: Path, state: Path, strict: ServerProcess
) -> None:
    """The last test: it ends the first server."""
    before = shown(strict, "good")
    strict.stop()
    shutil.rmtree(fleet / "good")
    shutil.copytree(adapters / "chat", fleet / "good")
    with start(tiny_base, fleet, state, "second.log", "--no-watch") as second:
        client = make_client(second.url)
        eventually(lambda: "broken" in {model.id for model in client.models.list()})
        assert chat(client, "broken", QUESTION), "it is served, and then in memory"
        eventually(lambda: shown(second, "broken")["proof"] == "failed")
        assert shown(second, "broken")["proofs"]["parity"]["reasons"]
        after = shown(second, "good")
        assert (after["digest"], after["proofs"]) == (before["digest"], before["proofs"])
        assert "Proof of adapter good" not in second.log.read_text()
