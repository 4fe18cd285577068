"""A real pass through a real PEFT adapter: what the trace says is what dense arithmetic says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.cli import main
from tests.conftest import PROJECTIONS
from train.answers import LocalChat
from train.trace import Trace, trace_adapter
from vllm_lora_ext.errors import AdapterRefused, BadInput, BadSetting

QUESTION = "Who are you?"
Adapter = Callable[..., Path]


@pytest.fixture
def adapter(random_base: str, tmp_path: Path) -> Adapter:
    """Saves a PEFT adapter whose parameters `fill` has set; keywords are those of LoraConfig."""

    def make(fill: Callable[[str, torch.Tensor], object], **config: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        settings = {"r": 4, "lora_alpha": 12, "target_modules": list(PROJECTIONS), **config}
        base = AutoModelForCausalLM.from_pretrained(random_base)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    fill(name, parameter)
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return make


def noise(name: str, parameter: torch.Tensor) -> None:
    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def inputs_of_modules(folder: Path) -> tuple[LocalChat, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """What each adapted module reads, and the logits of adapter and base, by hooks of the test's own."""
    chat, seen = LocalChat(folder), {}
    for name, module in chat.model.named_modules():
        if name.endswith(PROJECTIONS):
            stem = name.removeprefix("base_model.model.")
            module.register_forward_pre_hook(
                lambda _, args, stem=stem: seen.__setitem__(stem, args[0].detach())
            )
    ids = chat.prompt(QUESTION, chat.adapter_template)
    with torch.inference_mode():
        with chat.model.disable_adapter():
            base = chat.model(**ids).logits[0, -1]
        adapted = chat.model(**ids).logits[0, -1]
    return chat, seen, adapted, base


def test_a_share_is_what_dense_arithmetic_makes_of_the_same_input(adapter: Adapter) -> None:
    from safetensors.torch import load_file

    folder = adapter(noise, rank_pattern={"q_proj": 2}, use_rslora=True)
    trace = trace_adapter(folder, QUESTION)
    chat, seen, _, _ = inputs_of_modules(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {module.module for module in trace.modules} == set(seen) and len(seen) == 14
    for module in trace.modules:
        stem = f"base_model.model.{module.module}"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        layer = chat.model.get_submodule(stem).get_base_layer()
        x = seen[module.module]
        assert module.base == pytest.approx(rms(layer(x)), rel=1e-5)
        assert module.share == pytest.approx(12 / len(a) ** 0.5 * rms(x @ a.T @ b.T), rel=1e-4)
        assert module.ratio == pytest.approx(module.share / module.base)
        assert module.layer == int(module.module.split(".")[2])


def test_hooks_change_nothing_and_the_next_token_is_the_models_own(adapter: Adapter) -> None:
    folder = adapter(noise)
    trace = trace_adapter(folder, QUESTION)
    _, _, adapted, base = inputs_of_modules(folder)
    for told, logits in ((trace.adapter_next, adapted), (trace.base_next, base)):
        probabilities = torch.softmax(logits.double(), -1)
        top = torch.topk(probabilities, 5)
        assert [token.id for token in told] == top.indices.tolist()
        assert [token.probability for token in told] == pytest.approx(top.values.tolist())
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (adapted, base))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum")
    assert trace.divergence == pytest.approx(float(expected)) and trace.divergence > 0
    assert QUESTION in trace.prompt and trace.tokens > 4


def test_the_stream_is_that_of_transformers(adapter: Adapter) -> None:
    folder = adapter(noise)
    trace = trace_adapter(folder, QUESTION)
    chat = LocalChat(folder)
    ids = chat.prompt(QUESTION, chat.adapter_template)
    with torch.inference_mode():
        adapted = chat.model(**ids, output_hidden_states=True).hidden_states
        with chat.model.disable_adapter():
            base = chat.model(**ids, output_hidden_states=True).hidden_states
    assert [stream.layer for stream in trace.streams] == [0, 1]
    first = trace.streams[0]  # of the last layer, transformers shows what the final norm made of it
    assert first.base == pytest.approx(rms(base[1]), rel=1e-5)
    assert first.adapter == pytest.approx(rms(adapted[1]), rel=1e-5)
    assert first.moved == pytest.approx(rms(adapted[1] - base[1]), rel=1e-5)


def test_a_dead_adapter_has_no_share(adapter: Adapter) -> None:
    trace = trace_adapter(
        adapter(lambda name, tensor: tensor.zero_() if "lora_B" in name else None), QUESTION
    )
    assert {module.ratio for module in trace.modules} == {0.0}
    assert {stream.moved for stream in trace.streams} == {0.0}
    assert trace.divergence == 0 and trace.base_next == trace.adapter_next


def test_of_dora_the_share_is_the_difference_too(adapter: Adapter) -> None:
    """With B at zero and a magnitude 1.5 times as large, half of the base's output is added."""

    def grow(name: str, tensor: torch.Tensor) -> None:
        if "magnitude" in name:
            tensor.mul_(1.5)

    folder = adapter(grow, use_dora=True, target_modules=["o_proj"])  # which has no bias in this base
    with pytest.raises(AdapterRefused, match="feature_unsupported"):
        trace_adapter(folder, QUESTION)
    trace = trace_adapter(folder, QUESTION, allow=["feature_unsupported", "module_unknown"])
    assert [module.ratio for module in trace.modules] == pytest.approx([0.5, 0.5], rel=1e-5)


def test_an_embedding_lies_outside_the_layers(adapter: Adapter) -> None:
    trace = trace_adapter(adapter(noise, target_modules=["embed_tokens", "q_proj"]), QUESTION)
    (embedding,) = [module for module in trace.modules if module.layer is None]
    assert embedding.module == "model.embed_tokens" and embedding.share > 0


def test_a_text_that_is_too_long_and_numbers_that_are_none(adapter: Adapter) -> None:
    folder = adapter(lambda name, tensor: tensor.fill_(float("inf") if "1.mlp.up_proj" in name else 0.1))
    with pytest.raises(BadSetting, match="the base reads 32768"):
        trace_adapter(folder, "word " * 33_000)
    with pytest.raises(BadInput, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        trace_adapter(folder, QUESTION)


def test_the_command_prints_tables_or_data(adapter: Adapter, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(adapter(noise))
    assert main(["show", folder, "--trace", QUESTION]) == 0
    text = capsys.readouterr().out
    assert all(f" {kind} " in text for kind in PROJECTIONS) and "KL(adapter || base)" in text
    assert main(["show", folder, "--trace", QUESTION, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert set(body) == set(Trace.__dataclass_fields__) and len(body["modules"]) == 14
