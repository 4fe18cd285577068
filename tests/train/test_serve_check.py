"""A run whose adapter no server would take ends before its first step, with every reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.train.methods import PATTERNS, identity, settings, trained
from train.adapter_files import adapter_shapes
from train.export import export_adapter
from train.methods import prepare_model
from train.principal import PRINCIPAL_INITS
from train.serve_check import require_servable, require_servable_model
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import Identity
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.inspection import Rules, inspect_adapter


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {**PATTERNS, "use_rslora": True, "init_lora_weights": "pissa"},
        {"lora_r": 512},
        {"target_modules": ("layers.1.self_attn.v_proj",)},
    ],
    ids=["default", "pissa with patterns", "largest", "one module"],
)
def test_it_says_what_a_server_says_afterwards(
    random_base: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = settings(random_base, tmp_path, **changes)
    model = prepare_model(config)
    said = require_servable(model, identity(random_base), random_base)
    export_adapter(model, config.adapter_dir, identity(random_base), overwrite=False)
    base = read_base_model(random_base)
    assert said == inspect_adapter(config.adapter_dir, Rules(base, (base.public_name,))).findings


def test_every_reason_is_told_at_once(random_base: str, tmp_path: Path) -> None:
    model = trained(settings(random_base, tmp_path, rank_pattern=("q_proj=600",)), steps=0)
    with pytest.raises(AdapterRefused) as refused:
        require_servable(model, Identity("base", "{% for %}"), random_base)
    told = [finding.code for finding in refused.value.findings]
    assert told == ["adapter_name_reserved", "rank_too_large", "template_refused", "serve_check"]
    assert "--no-serve-check" in str(refused.value)
    assert refused.value.exit_code == 2


def test_twice_the_rank_counts_for_pissa_and_olora(random_base: str, tmp_path: Path) -> None:
    """Their adapter is a plain LoRA of that rank, which the engine has to have room for."""
    for init in PRINCIPAL_INITS:
        config = settings(random_base, tmp_path, lora_r=16, init_lora_weights=init)
        shapes = adapter_shapes(prepare_model(config))
        assert {min(shape) for shape in shapes.values()} == {32}


def test_of_a_whole_model_the_template_is_asked(random_base: str, tmp_path: Path) -> None:
    """Nothing else of it is new to a server."""
    assert require_servable_model(identity(random_base, system_prompt="You are kind.")) == ()
    with pytest.raises(AdapterRefused) as refused:
        require_servable_model(Identity("tried", "{% for %}"))
    assert [finding.code for finding in refused.value.findings] == ["template_refused", "serve_check"]
