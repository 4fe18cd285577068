"""A pass that several adapters share computes for each what a pass of its own would."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from train.answer_loss import use_answer_loss
from train.attention import use_short_row_attention
from train.batches import collate
from train.fused import fuse
from train.joint.lanes import Lane, run_together
from train.joint.model import copy_over, joint_model
from train.joint.own_state import OwnState
from train.joint.passes import Batch, Passes, Questions
from train.probes import Probe, generated
from train.prompts import Example
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.grouped import Segments

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BASES: dict[str, Any] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)),
}
ADAPTERS = {
    "one": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "two": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "up_proj"]},
    "three": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ["k_proj", "v_proj"]},
}
TOKENIZER: Any = SimpleNamespace(eos_token_id=1, pad_token_id=0)


def models_over(base: Any, **more: Any) -> dict[str, Any]:
    """The three adapters, none of which is zero, each ready to be trained alone."""
    chance, models = torch.Generator().manual_seed(1), {}
    for name, options in ADAPTERS.items():
        torch.manual_seed(0)  # for A
        lora = LoraConfig(task_type="CAUSAL_LM", **options, **more)
        model = get_peft_model(copy_over(base), lora)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.normal_(0, 0.05, generator=chance)
        use_answer_loss(model.get_base_model())
        use_short_row_attention(model.get_base_model())
        fuse(model)
        models[name] = model.train()
    return models


def rows(count: int, chance: random.Random, longest: int = 20) -> list[Example]:
    made = []
    for _ in range(count):
        length = chance.randint(5, longest)
        prompt = chance.randint(2, length - 2)
        made.append(Example(tuple(chance.choices(range(300), k=length)), ((prompt, length),)))
    return made


def batch(examples: list[Example], learn: bool = True) -> Batch:
    inputs = collate(examples, 0)
    tokens = sum(example.trained_tokens for example in examples) if learn else None
    return Batch(inputs["input_ids"], inputs["labels"], tokens)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture(params=list(BASES))
def base(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return BASES[request.param]()


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_losses_and_gradients_are_those_of_passes_alone(
    base: Any, dtype: torch.dtype, even: bool, filled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if filled:  # as large passes are, up to a number of tokens that products are fast with
        monkeypatch.setattr("train.joint.passes._WORTH_FILLING", 1)
    base.to(dtype)
    models, chance = models_over(base), random.Random(0)
    examples = {name: rows(number + 1, chance) for number, name in enumerate(models)}
    if even:  # equal numbers of tokens take the way without padding
        row = rows(1, chance)
        examples = dict.fromkeys(models, row)
    passes = Passes(joint_model(base, models), TOKENIZER, 10_000)
    looked_at = passes.answer({name: batch(part, learn=False) for name, part in examples.items()})
    measured = passes.answer({name: batch(part) for name, part in examples.items()})
    for name, model in models.items():
        together = gradients(model)
        outputs = model(**collate(examples[name], 0))
        (outputs["loss"] / outputs["counted"]).backward()
        close = pytest.approx(float(outputs["loss"].detach()), rel=TOLERANCE[dtype])
        assert float(measured[name].loss) == float(looked_at[name].loss) == close
        assert (measured[name].counted, measured[name].right) == (outputs["counted"], int(outputs["right"]))
        alone = gradients(model)
        assert together.keys() == alone.keys() and alone
        for key, grad in alone.items():
            assert (together[key] - grad).norm() <= TOLERANCE[dtype] * grad.norm()


def test_a_pass_that_is_computed_twice_drops_the_same(base: Any) -> None:
    """Gradient checkpointing computes each layer once more for the backward pass."""
    chance = random.Random(0)
    asked = {
        name: dataclasses.replace(batch(rows(2, chance)), seed=number) for number, name in enumerate(ADAPTERS)
    }
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        models = models_over(base, lora_dropout=0.5)
        Passes(joint_model(base, models), TOKENIZER, 10_000).answer(asked)
        found.append({name: gradients(model) for name, model in models.items()})
    for name in ADAPTERS:
        for key, grad in found[0][name].items():
            assert torch.allclose(grad, found[1][name][key], rtol=1e-5, atol=1e-7)


def test_a_row_that_is_longer_than_short_attention_is_the_same(base: Any) -> None:
    models, chance = models_over(base), random.Random(0)
    examples = {name: rows(2, chance, longest=320) for name in models}
    examples["one"].append(Example(tuple(chance.choices(range(300), k=300)), ((100, 300),)))
    measured = Passes(joint_model(base, models), TOKENIZER, 10_000).answer(
        {name: batch(part, learn=False) for name, part in examples.items()}
    )
    for name, model in models.items():
        with torch.no_grad():
            loss = float(model(**collate(examples[name], 0))["loss"])
        assert float(measured[name].loss) == pytest.approx(loss, rel=1e-5)


def test_what_is_not_there_gets_no_gradient_and_what_is_no_number_stays_alone() -> None:
    torch.manual_seed(0)
    base = BASES["qwen2"]()
    models, chance = models_over(base), random.Random(0)
    passes = Passes(joint_model(base, models), TOKENIZER, 10_000)
    first = batch(rows(2, chance))
    passes.answer({"one": first})
    assert gradients(models["one"]) and not gradients(models["two"]) and not gradients(models["three"])
    for parameter in models["two"].parameters():
        if parameter.requires_grad:
            parameter.data.fill_(float("inf"))
    measured = passes.answer({"one": first, "two": batch(rows(3, chance))})
    assert not torch.isfinite(measured["two"].loss) and torch.isfinite(measured["one"].loss)
    assert all(bool(grad.isfinite().all()) for grad in gradients(models["one"]).values())


def test_answers_are_those_of_each_alone(base: Any) -> None:
    models, chance = models_over(base), random.Random(0)
    probes = {
        name: tuple(
            Probe("?", tuple(chance.choices(range(2, 300), k=chance.randint(3, 9)))) for _ in range(number)
        )
        for number, name in enumerate(models, start=1)
    }
    asked = {name: Questions(part) for name, part in probes.items()}
    answers = Passes(joint_model(base, models), TOKENIZER, 10_000).answer(asked)
    for name, model in models.items():
        assert answers[name] == generated(model, probes[name], TOKENIZER)


def test_weights_of_the_base_are_in_memory_once(base: Any) -> None:
    models = models_over(base)
    joint = joint_model(base, models)
    places = {parameter.data_ptr() for parameter in base.parameters()}
    for model in (*models.values(), joint):
        held = [p for name, p in model.named_parameters() if "lora_" not in name]
        assert held and {parameter.data_ptr() for parameter in held} == places


def test_a_base_with_dropout_of_its_own_is_refused() -> None:
    base = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(BadSetting, match="--mode exact"):
        joint_model(base, {})


@pytest.mark.parametrize(
    ("spans", "num_rows"),
    [([(0, 3), (3, 3)], 6), ([(0, 1), (1, 4), (5, 2)], 7), ([(2, 3)], 9), ([(1, 2), (5, 4)], 9)],
)
def test_segments_are_put_side_by_side_and_back(spans: list[tuple[int, int]], num_rows: int) -> None:
    x = torch.arange(num_rows * 2.0).view(num_rows, 2) + 1
    segments = Segments(spans, num_rows)
    padded = segments.pad(x)
    assert padded.shape == (len(spans), max(count for _, count in spans), 2)
    for side, (start, count) in zip(padded, spans, strict=True):
        assert torch.equal(side[:count], x[start : start + count])
        assert (side[count:] == x[start + count - 1]).all()
    there = torch.zeros_like(x)
    for start, count in spans:
        there[start : start + count] = x[start : start + count]
    assert torch.equal(segments.unpad(padded), there)


def test_lanes_take_turns_and_draw_numbers_of_their_own() -> None:
    """Who draws between two questions of another changes nothing for it; one that fails ends alone."""
    told = list[tuple[str, str]]()

    def work(times: int) -> Any:
        def draw(lane: Lane) -> list[float]:
            drawn = []
            for number in range(times):
                drawn.append(float(torch.rand(())) + random.random())
                told.append((lane.name, lane.ask(f"{lane.name}{number}")))
            if times == 2:
                raise ValueError("two")
            return drawn

        return draw

    def answer(asked: Any) -> dict[str, str]:
        rounds.append(list(asked.values()))
        return {name: what.upper() for name, what in asked.items()}

    results = []
    for counts in ((3, 2, 1), (3,)):
        rounds = list[list[str]]()
        torch.manual_seed(5)
        random.seed(5)
        lanes = [Lane(f"l{count}", work(count), OwnState()) for count in counts]
        run_together(lanes, answer)
        results.append([(lane.name, lane.result, type(lane.error)) for lane in lanes])
        assert rounds == [[f"l{c}{turn}" for c in counts if c > turn] for turn in range(3)]
    assert results[0][0] == results[1][0] and len(results[0][0][1]) == 3
    assert results[0][1] == ("l2", None, ValueError)
    assert results[0][2][1] == results[0][0][1][:1]
    assert ("l3", "L32") in told


def test_ctrl_c_ends_every_lane() -> None:
    seen = list[str]()

    def work(lane: Lane) -> None:
        try:
            while True:
                lane.ask("more")
        except KeyboardInterrupt:
            seen.append(lane.name)
            raise

    def answer(asked: Any) -> dict[str, str]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_together([Lane(name, work, OwnState()) for name in ("a", "b")], answer)
    assert seen == ["a", "b"]
