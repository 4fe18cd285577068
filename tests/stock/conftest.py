"""Two arms: plain vLLM, which shows the failure, and vLLM with our plugin, which does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.models import make_random_adapter, make_random_base
from tests.arm import Arm

pytest.importorskip("vllm", reason="vLLM is not installed: these tests run both arms in a real engine")

SLOTS = 2
SETTINGS = {"max_loras": SLOTS, "max_cpu_loras": SLOTS, "max_lora_rank": 16, "dtype": "float32"}
MENDED = "plain vLLM no longer shows this failure: our patch for it can go (see docs/decisions.md)"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_base(tmp_path_factory.mktemp("stock") / "base", "tiny")


@pytest.fixture
def make_adapter(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """An adapter of random weights, large enough to be told from the base."""

    def make(name: str, seed: int = 0, strength: float = 8.0) -> Path:
        folder = make_random_adapter(tmp_path / name, base, 8, seed)
        weights = folder / "adapter_model.safetensors"
        tensors = {key: tensor.to(torch.float32) * strength for key, tensor in load_file(weights).items()}
        weights.unlink()
        save_file(tensors, weights)
        return folder

    return make


@pytest.fixture(scope="session")
def arms(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Arm]]:
    """One engine of each arm for all tests, started when it is first asked for."""
    started: dict[str, Arm] = {}
    folder = tmp_path_factory.mktemp("arms")

    def arm(kind: str) -> Arm:
        if kind not in started:
            started[kind] = Arm(base, folder / f"{kind}.log", plugin=kind == "ours", **SETTINGS)
        return started[kind]

    yield arm
    for running in started.values():
        running.stop()


@pytest.fixture
def doomed(base: Path, tmp_path: Path) -> Iterator[Arm]:
    """A plain engine of its own, for a test that kills it."""
    with Arm(base, tmp_path / "doomed.log", plugin=False, **SETTINGS) as arm:
        yield arm
