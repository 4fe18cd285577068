"""Adapters and bases made by hand, small enough to write in a test, and the recipe of the tiny base."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from safetensors.numpy import save_file

# No test asserts a time, and a busy machine draws examples slowly.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

ROOT = Path(__file__).resolve().parent.parent
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE_CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SHAPES = {  # module -> (out_features, in_features) of BASE_CONFIG
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (96, 64),
    "mlp.up_proj": (96, 64),
    "mlp.down_proj": (64, 96),
}


def load_file(path: Path, name: str) -> ModuleType:
    """A Python file outside any package, as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def lora_tensors(rank: int = 8, layers: int = 2) -> dict[str, np.ndarray]:
    """A and B of every projection, as PEFT names them."""
    chance = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for module, (out_features, in_features) in SHAPES.items():
            stem = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{stem}.lora_A.weight"] = chance.normal(size=(rank, in_features))
            tensors[f"{stem}.lora_B.weight"] = chance.normal(size=(out_features, rank))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.fixture(scope="session", autouse=True)
def own_state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What servers keep by default is kept in a folder of the tests, not in the user's."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state-home"))


@pytest.fixture
def calm_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, str], bool]:
    """Whether a load test ended well, however noisy the machine is; its limit is not looked for."""
    from serve.loadtest.own_cost import ClientLimit, remember_limit

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remember_limit(ClientLimit(1000.0, 2.0, 1, "nothing"))
    return lambda code, told: code == 0 or (code == 1 and "CLIENT-BOUND" in told)


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    """A base model seen by admission: its config and nothing else."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE_CONFIG))
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path, base_folder: Path) -> Callable[..., Path]:
    """Writes a PEFT folder; keywords change its config, `tensors` its weights."""

    def make(name: str = "xiaoli", tensors: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        body = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base_folder),
            "r": 8,
            "lora_alpha": 16,
            "bias": "none",
            "target_modules": list(PROJECTIONS),
            **config,
        }
        (folder / "adapter_config.json").write_text(json.dumps(body))
        save_file(lora_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    """`examples/tiny_base/make.py`."""
    return load_file(ROOT / "examples" / "tiny_base" / "make.py", "tiny_base_recipe")


@pytest.fixture(scope="session")
def tokenizer(recipe: ModuleType) -> Any:
    """The tiny base's tokenizer: byte-level BPE, ChatML template, no begin token."""
    return recipe.make_tokenizer()


def adapter_for(shapes: dict[str, tuple[int, int]], rank: int, folder: Path, base_model: str) -> Path:
    """A PEFT folder with zero matrices for `shapes` (module -> (out_features, in_features))."""
    folder.mkdir(parents=True)
    tensors = {}
    for module, (out_features, in_features) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.zeros((rank, in_features), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.zeros((out_features, rank), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "target_modules": sorted({module.split(".")[-1] for module in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """The tiny base, made once and kept beside the demo's."""
    folder = ROOT / ".cache" / "tiny-base"
    recipe = ROOT / "examples" / "tiny_base" / "make.py"
    subprocess.run([sys.executable, str(recipe), "--output-dir", str(folder)], check=True)
    return folder
