"""What makes training fast computes what the plain way computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from train.answer_loss import use_answer_loss
from train.attention import attend, use_short_row_attention
from train.batches import LengthBuckets, collate
from train.fused import fuse
from train.prompts import Example

# float32: sums are taken in another order. bfloat16: 8 bits, in which the plain way rounds elsewhere.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
ROWS = [
    Example((5, 9, 11, 30, 7, 8), ((2, 4), (5, 6))),  # two answers
    Example((5, 9, 11, 30, 7, 8, 12, 13, 14), ((3, 9),)),
    Example((5, 6), ((1, 2),)),
]


def with_adapter(base: Any, **options: Any) -> Any:
    """`base` with a LoRA whose B is not zero, so that every gradient is something."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **options)
    model = get_peft_model(base, lora)
    chance = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=chance)
    return model.train()


def plain(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients with transformers' and PEFT's own code, row for row, nothing padded."""
    total = sum(row.trained_tokens for row in ROWS)
    loss = torch.zeros(())
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].float()
        labels = torch.tensor(row.labels[1:])
        loss = loss + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    (loss / total).backward()
    return float(loss.detach()) / total, gradients(model)


def fast(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The same by our way, in one padded batch."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    use_answer_loss(causal)
    use_short_row_attention(causal)
    fuse(model)
    outputs = model(**collate(ROWS, pad=0))
    assert outputs["counted"] == sum(row.trained_tokens for row in ROWS)
    (outputs["loss"] / outputs["counted"]).backward()
    return float(outputs["loss"].detach()) / outputs["counted"], gradients(model)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(one: Any, two: Any, tolerance: float) -> None:
    (loss_one, grads_one), (loss_two, grads_two) = one, two
    assert loss_two == pytest.approx(loss_one, rel=tolerance)
    assert grads_one.keys() == grads_two.keys()
    for name, grad in grads_one.items():
        assert float((grads_two[name] - grad).norm()) <= tolerance * float(grad.norm()), name


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj"], ALL], ids=["qkv", "all"])
def test_loss_and_gradients_are_those_of_the_plain_way(
    random_base: str, dtype: torch.dtype, targets: list[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=dtype)
    model = with_adapter(base, target_modules=targets)
    assert_same(plain(model), fast(model), TOLERANCE[dtype])


def test_everything_in_a_qwen2_is_exchanged(random_base: str) -> None:
    model = with_adapter(AutoModelForCausalLM.from_pretrained(random_base), target_modules=ALL)
    layers = model.config.num_hidden_layers
    assert fuse(model) == layers * (len(ALL) + 2 + 1) + 1  # adapters, two norms, one MLP; the last norm


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_of_adapters_stay_as_they_are(random_base: str, options: dict[str, bool]) -> None:
    model = with_adapter(AutoModelForCausalLM.from_pretrained(random_base), target_modules=ALL, **options)
    assert_same(plain(model), fast(model), TOLERANCE[torch.float32])


def test_full_fine_tuning_has_the_gradients_of_every_weight(random_base: str) -> None:
    model = (
        AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32).requires_grad_(True).train()
    )
    one = plain(model)
    assert len(one[1]) == sum(1 for _ in model.parameters())
    assert_same(one, fast(model), TOLERANCE[torch.float32])


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    "base",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        lambda: GemmaForCausalLM(GemmaConfig(**SMALL)),  # another norm, and another activation
        lambda: GraniteForCausalLM(
            GraniteConfig(**SMALL, logits_scaling=3.0)
        ),  # logits change behind the head
    ],
    ids=["llama", "gemma", "granite"],
)
def test_other_architectures_are_the_same_too(base: Any) -> None:
    torch.manual_seed(0)
    model = with_adapter(base(), target_modules=ALL)
    assert_same(plain(model), fast(model), 1e-4)


def test_an_adapter_that_is_switched_off_is_off(random_base: str) -> None:
    ids = torch.arange(9)[None]
    base = AutoModelForCausalLM.from_pretrained(random_base)
    expected = base(ids).logits
    model = with_adapter(base, target_modules=ALL)
    fuse(model)
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, expected)


def test_dropout_is_on_the_adapters_input_only(random_base: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(random_base)
    model = with_adapter(base, target_modules=["q_proj"], lora_dropout=0.5)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, layer.base_layer.in_features)
    torch.manual_seed(7)
    expected = layer(x.requires_grad_())
    (grad,) = torch.autograd.grad(expected.sum(), x)
    fuse(model)
    torch.manual_seed(7)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("heads", "groups", "length"), [(4, 4, 1), (4, 2, 7), (6, 1, 33), (2, 2, 300)])
def test_attention_is_torchs(heads: int, groups: int, length: int) -> None:
    torch.manual_seed(0)
    shapes = ((2, heads, length, 8), (2, groups, length, 8), (2, groups, length, 8))
    query, key, value = (torch.randn(shape, requires_grad=True) for shape in shapes)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // groups  # type: ignore[assignment]
    found, _ = attend(module, query, key, value, None, scaling=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    direction = torch.randn(found.shape)
    ours = torch.autograd.grad(found, (query, key, value), direction)
    theirs = torch.autograd.grad(expected, (query, key, value), direction)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_attention_with_a_mask_is_torchs() -> None:
    torch.manual_seed(0)
    query = key = value = torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    mask = torch.rand(1, 1, 5, 5) > 0.4
    mask |= torch.eye(5, dtype=torch.bool)
    found, _ = attend(module, query, key, value, mask, scaling=8**-0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, expected.transpose(1, 2))


def test_every_row_comes_once_an_epoch_beside_rows_of_its_length() -> None:
    lengths = [10 + number % 50 for number in range(203)]
    buckets = LengthBuckets(lengths, 4, seed=3)
    first, again = list(buckets), list(buckets)
    assert sorted(first) == list(range(203))
    assert first == again
    buckets.set_epoch(1)
    assert list(buckets) != first
    spread = [
        max(lengths[row] for row in batch) - min(lengths[row] for row in batch)
        for batch in (first[at : at + 4] for at in range(0, 200, 4))
    ]
    assert sum(spread) / len(spread) < 5  # in random order it would be 30
