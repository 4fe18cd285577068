"""Generated adapters: never an unhandled exception, never one admitted that PEFT would not load.

500 examples each in `make test`, 10,000 in `make fuzz` (FUZZ_EXAMPLES).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.fuzz.strategies import GOOD_CONFIG, configs, good_tensors, weight_files, weights, whole_files
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.intake import Admitted, admit
from vllm_lora_ext.store import AdapterStore
from vllm_lora_ext.strict_json import JsonRefused, parse_object
from vllm_lora_ext.tensor_file import HeaderRefused, TensorPlace, read_header

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "500"))
generated = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES <= 500
)

pytestmark = [
    pytest.mark.timeout(24 * 3600 if EXAMPLES > 500 else 600),
    pytest.mark.filterwarnings("ignore"),  # PEFT warns of much that is odd here
]

CONFIG = Qwen2Config(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=32,
    tie_word_embeddings=False,
)


class Base:
    """The model, which does not print itself whole when a test fails."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = AutoModelForCausalLM.from_config(CONFIG).eval()


@pytest.fixture(scope="module")
def base() -> Base:
    return Base()


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def tried(folder: Path, scratch: Path) -> Admitted | None:
    """What admission makes of a folder; None for a refusal, which leaves nothing in the store."""
    store = AdapterStore(scratch / "store")
    shutil.rmtree(store.root, ignore_errors=True)
    try:
        return admit(folder, store, Rules(BaseModel("base", CONFIG.to_dict())))
    except AdapterRefused as error:
        assert error.findings and all(finding.rule for finding in error.findings)
        str(error).encode()
        assert not store.digests() and not list(store.root.glob(".*"))
        return None


def logits(base: Base, folder: Path) -> torch.Tensor:
    """The answer with an adapter, all of whose tensors PEFT took."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(copy.deepcopy(base.model), str(folder))
        result = model.load_adapter(str(folder), adapter_name="again")
    assert not result.unexpected_keys, result.unexpected_keys
    assert isinstance(PeftConfig.from_pretrained(str(folder)).r, int)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(6)[None]).logits
    return found


def check(folder: Path, scratch: Path, base: Base) -> None:
    admitted = tried(folder, scratch)
    if admitted is not None:
        assert torch.equal(logits(base, folder), logits(base, admitted.version.folder))


def test_the_good_one_is_admitted(base: Base, scratch: Path) -> None:
    folder = write_adapter(scratch / "good", GOOD_CONFIG, good_tensors())
    assert tried(folder, scratch) is not None
    check(folder, scratch, base)


@generated
@given(config=configs())
def test_any_config(config: dict[str, Any], base: Base, scratch: Path) -> None:
    check(write_adapter(scratch / "adapter", config, good_tensors()), scratch, base)


@generated
@given(config=configs(), tensors=weights())
def test_any_config_with_any_tensors(
    config: dict[str, Any], tensors: dict[str, np.ndarray], base: Base, scratch: Path
) -> None:
    check(write_adapter(scratch / "adapter", config, tensors), scratch, base)


def header_of(path: Path) -> tuple[TensorPlace, ...] | None:
    try:
        with RegularFile(path) as file:
            return read_header(file)
    except HeaderRefused as error:
        str(error).encode()
        return None


@generated
@given(data=weight_files() | whole_files())
def test_any_weights_file(data: bytes, scratch: Path) -> None:
    """What we take for a safetensors file the library takes as well, and sees the same in it."""
    path = scratch / "adapter_model.safetensors"
    path.write_bytes(data)
    places = header_of(path)
    if places is None:
        return
    with safe_open(path, framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        seen = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    assert {place.spec.name: (place.spec.dtype, place.spec.shape) for place in places} == seen


@generated
@given(data=weight_files())
def test_any_json(data: bytes) -> None:
    """Whatever is taken is JSON that Python takes as well."""
    try:
        body = parse_object(data[8:])
    except JsonRefused:
        return
    assert json.loads(data[8:]) == body
