"""Two oracles for mixed batches, in a real engine whose batches are the same from run to run.

(a) Bit for bit: a row's tokens and log-probabilities do not change when the other rows of its batch
get other adapters, or none. (b) The same request alone, and PEFT, say the same within a tolerance.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.models import make_random_base
from tests.arm import Arm

# 2,000 are the campaign's, `make exactness`.
COMPARISONS = int(os.environ.get("EXACTNESS_COMPARISONS", "300"))
VOCABULARY = 512
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (1, 3, 8, 13, 64, 128)
ROWS = 12


def peft_adapter(base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """A PEFT adapter with random A and B, made and saved by PEFT itself."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15 if "lora_B" in name or "embedding_B" in name else 0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_base(tmp_path_factory.mktemp("exact") / "base", "tiny")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random ranks, targets and scalings."""
    folder = tmp_path_factory.mktemp("adapters")
    chance = random.Random(0)
    made = {}
    for seed, rank in enumerate(RANKS):
        targets = chance.sample(PROJECTIONS, chance.randint(2, len(PROJECTIONS)))
        made[f"r{rank}"] = peft_adapter(
            base,
            folder / f"r{rank}",
            seed,
            r=rank,
            lora_alpha=chance.choice([1, 4, 7]) * max(1, rank // 8),
            target_modules=targets,
            use_rslora=bool(seed % 2),
            rank_pattern={targets[0]: min(128, rank * 2)} if rank == 8 else {},
        )
    return made


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def arm(
    request: pytest.FixtureRequest, base: Path, adapters: dict[str, Path], tmp_path_factory: Any
) -> Iterator[Arm]:
    settings = {
        "max_loras": len(RANKS),
        "max_lora_rank": 128,
        "dtype": request.param,
        "enable_prefix_caching": False,
    }
    log = tmp_path_factory.mktemp("log") / f"{request.param}.log"
    with Arm(base, log, plugin=True, one_process=True, **settings) as running:
        for number, (name, folder) in enumerate(adapters.items(), 1):
            running("name", name=name, path=str(folder), number=number)
        yield running


def prompts(chance: random.Random) -> list[list[int]]:
    """Of different lengths, so that some rows decode while others are still read."""
    return [[chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 60))] for _ in range(ROWS)]


def mixes(count: int) -> st.SearchStrategy[list[int]]:
    """For each row one of `count` adapters, or 0 for none."""
    return st.lists(st.integers(0, count), min_size=ROWS, max_size=ROWS)


def test_a_row_does_not_change_a_bit_when_the_others_change(arm: Arm, adapters: dict[str, Path]) -> None:
    names = [None, *adapters]
    compared = [0]

    # Half of the rows keep their adapters on average, so that many are compared in each example.
    @settings(max_examples=-(-COMPARISONS // (ROWS // 2)), deadline=None, database=None)
    @given(
        seed=st.integers(0, 2**32),
        one=mixes(len(adapters)),
        other=mixes(len(adapters)),
        kept=st.sets(st.integers(0, ROWS - 1), min_size=ROWS // 2),
    )
    def check(seed: int, one: list[int], other: list[int], kept: set[int]) -> None:
        texts = prompts(random.Random(seed))
        changed = [one[row] if row in kept else other[row] for row in range(ROWS)]
        first = arm.generate([(texts[row], names[one[row]]) for row in range(ROWS)], max_tokens=6)
        second = arm.generate([(texts[row], names[changed[row]]) for row in range(ROWS)], max_tokens=6)
        for row in kept:
            assert first[row] == second[row]
        compared[0] += len(kept)

    check()
    print(f"{compared[0]} comparisons in {arm.dtype}, 0 rows changed")


def test_a_row_beside_others_is_as_it_is_alone(arm: Arm, adapters: dict[str, Path]) -> None:
    if arm.dtype != "float32":
        pytest.skip("vLLM is not batch-invariant in bfloat16: other shapes take other kernels")
    chance = random.Random(7)
    names = [None, *adapters, *adapters][:ROWS]
    texts = prompts(chance)
    together = arm.generate(list(zip(texts, names, strict=True)), max_tokens=6)
    for row in range(ROWS):
        (alone,) = arm.generate([(texts[row], names[row])], max_tokens=6)
        assert alone["tokens"] == together[row]["tokens"]
        assert alone["logprobs"] == pytest.approx(together[row]["logprobs"], abs=1e-4)


def test_an_adapter_says_what_peft_says(arm: Arm, base: Path, adapters: dict[str, Path]) -> None:
    """Log-probabilities of the answer: within 1e-3 in float32, within 0.15 in bfloat16, whose numbers have
    eight bits and whose activations are rounded after every module."""
    tolerance = 1e-3 if arm.dtype == "float32" else 0.15
    chance = random.Random(3)
    prompt = [chance.randrange(VOCABULARY) for _ in range(24)]
    answers = arm.generate([(prompt, name) for name in adapters], max_tokens=6)
    for (name, folder), answer in zip(adapters.items(), answers, strict=True):
        expected = peft_logprobs(base, folder, prompt, answer["tokens"])
        assert answer["logprobs"] == pytest.approx(expected, abs=tolerance), name


def peft_logprobs(base: Path, folder: Path, prompt: list[int], answer: list[int]) -> list[float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        logits = adapted(torch.tensor([prompt + answer])).logits[0]
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]


def llama_base(folder: Path) -> Path:
    """A random Llama: a model on which vLLM takes LoRA for embeddings and `lm_head` too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("compiled", [False, True])
def test_embeddings_and_lm_head_take_lora(compiled: bool, tmp_path: Path) -> None:
    base = llama_base(tmp_path / "llama")
    targets = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
    folder = peft_adapter(
        base, tmp_path / "vocab", 1, r=4, lora_alpha=4, target_modules=targets, ensure_weight_tying=False
    )
    settings = {
        "dtype": "float32",
        "max_loras": 2,
        "max_lora_rank": 8,
        "enforce_eager": not compiled,
        "enable_prefix_caching": False,
    }
    with Arm(base, tmp_path / "llama.log", plugin=True, one_process=True, **settings) as arm:
        arm("name", name="vocab", path=str(folder), number=1)
        prompt = list(range(5, 40))
        base_alone, _ = arm.generate([(prompt, None), (prompt, None)], max_tokens=6)
        of_base, answer = arm.generate([(prompt, None), (prompt, "vocab")], max_tokens=6)
    assert of_base == base_alone
    expected = peft_logprobs(base, folder, prompt, answer["tokens"])
    assert answer["logprobs"] == pytest.approx(expected, abs=1e-3)


def test_two_ranks_say_what_one_says(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    answers: list[Callable[..., Any]] = []
    prompt = list(range(3, 30))
    names = [None, "r8", "r64", None]
    for ranks in (1, 2):
        settings = {
            "dtype": "float32",
            "max_loras": 2,
            "max_lora_rank": 128,
            "tensor_parallel_size": ranks,
            "enable_prefix_caching": False,
        }
        cores = {
            "VLLM_CPU_OMP_THREADS_BIND": "0|1" if ranks == 2 else "0-1"
        }  # vLLM wants a NUMA node per rank
        with Arm(base, tmp_path / f"tp{ranks}.log", plugin=True, environment=cores, **settings) as arm:
            for number, name in enumerate(("r8", "r64"), 1):
                arm("name", name=name, path=str(adapters[name]), number=number)
            answers.append(arm.generate([(prompt, name) for name in names], max_tokens=6))
    for one, two in zip(*answers, strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["logprobs"] == pytest.approx(two["logprobs"], abs=1e-3)
