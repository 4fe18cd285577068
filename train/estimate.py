"""What a run will take, before it starts: memory and time, from the base's config and a measured rate.

An estimate, stated as one: no weights are loaded and no step is made. The factors were fitted to what
autograd keeps for, and how long steps take of, Qwen2 models of several widths.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.config import ALL_LINEAR, TrainConfig, planned_steps
from train.model import first_line
from train.prompts import Example
from vllm_lora_ext.errors import BadBaseModel
from vllm_lora_ext.peft_config import resolve_pattern

if TYPE_CHECKING:
    import torch

_STATE_BYTES = 16  # of a trained number: itself, its gradient and AdamW's two moments, in fp32
_QUANTISED_BYTES = 0.56  # of a number in 4 bits with its share of the scales
# What autograd keeps of a token in one layer, in bytes per unit of (hidden, keys and values, MLP) width.
_KEPT = {("full", 4): (32, 8, 16), ("adapter", 4): (24, 8, 16), ("adapter", 2): (38, 4, 10)}
_LOGIT_BYTES = 12  # per trained token and word of the vocabulary: logits, their softmax and its gradient
_CALLS_PER_LAYER = {"full": 560, "adapter": 800}  # operations of a step, forward and backward
_MEASURE_S = 0.5


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a base (`parameters`, of which a token passes `active` besides the head) and its widths.

    `head` is vocabulary x hidden, `trained` what gets a gradient, `linear` what 4 bits would hold.
    """

    parameters: int
    active: int
    head: int
    trained: int
    linear: int
    layers: int
    hidden: int
    keys: int  # width of keys, and of values
    mlp: int


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds of a run; `flops_per_second` is what this machine reached for `flops`."""

    weights_bytes: int
    trained_bytes: int
    activation_bytes: int
    seconds: float
    flops: float
    flops_per_second: float
    steps: int

    @property
    def memory_bytes(self) -> int:
        """Everything that is in memory at once, without Python and torch (half a gigabyte)."""
        return self.weights_bytes + self.trained_bytes + self.activation_bytes


def model_size(config: TrainConfig) -> ModelSize:
    """The size of the configured base and of what is trained on it.

    The model is built without memory for its weights (torch's `meta` device).

    Raises:
        BadBaseModel: transformers cannot build it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        base = AutoConfig.from_pretrained(config.base_path)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base)
    except Exception as error:  # transformers lets through whatever damaged files cause
        raise BadBaseModel(
            config.base_model, f"cannot be built from its config ({first_line(error)})", "Restore its files."
        ) from error
    text = base.get_text_config()
    linears = {name: tuple(m.weight.shape) for name, m in model.named_modules() if _is_linear(m)}
    parameters = sum(p.numel() for p in model.parameters())
    head_layer, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head = embedding.weight.numel()
    is_tied = head_layer is None or head_layer.weight is embedding.weight
    body = parameters - head * (1 if is_tied else 2)
    names = {id(module): name for name, module in model.named_modules()}
    linears.pop(names.get(id(head_layer), ""), None)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return ModelSize(
        parameters,
        body - _idle_experts(model, text),
        head,
        parameters if config.method == "full" else _trained(linears, config),
        sum(math.prod(shape) for shape in linears.values()),
        text.num_hidden_layers,
        text.hidden_size,
        kv_heads * head_dim,
        text.intermediate_size,
    )


def estimate(
    training: Sequence[Example], size: ModelSize, config: TrainConfig, dtype: torch.dtype
) -> Estimate:
    """Memory and time of training on these examples; takes about a second, to measure the machine."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps = planned_steps(len(training), config)
    share = steps * per_step / len(training)  # how often an example is seen; the last batch may be smaller
    epochs = min(share, config.num_train_epochs) if config.max_steps <= 0 else share
    lengths = [len(example.input_ids) for example in training]
    tokens, trained_tokens = sum(lengths) * epochs, sum(e.trained_tokens for e in training) * epochs
    flops = _flops(size, config, tokens, trained_tokens, sum(n * n for n in lengths) * epochs)
    batch_tokens = max(1, round(config.per_device_train_batch_size * sum(lengths) / len(lengths)))
    rate, call_s = measure(size, batch_tokens, dtype)
    kind = "full" if config.method == "full" else "adapter"
    calls = steps * config.gradient_accumulation_steps * size.layers * _CALLS_PER_LAYER[kind]
    weights, trained = _weight_bytes(size, config, dtype.itemsize)
    return Estimate(
        weights,
        trained,
        _activation_bytes(training, size, config, dtype.itemsize),
        flops / rate + calls * call_s,
        flops,
        rate,
        steps,
    )


def measure(size: ModelSize, tokens: int, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of this machine in a product of the model's own shape, and seconds of an operation on little."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(tokens, size.hidden, device=device, dtype=dtype)
    weight = torch.randn(size.mlp, size.hidden, device=device, dtype=dtype)
    little = torch.ones(8, device=device)

    def seconds_of(work: Any) -> float:
        work()
        times: list[float] = []
        ends = time.perf_counter() + _MEASURE_S
        while not times or time.perf_counter() < ends:
            started = time.perf_counter()
            for _ in range(8):
                work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - started) / 8)
        return statistics.median(times)  # the mean would count what other programs took once

    rate = 2 * tokens * size.hidden * size.mlp / seconds_of(lambda: torch.nn.functional.linear(x, weight))
    return rate, seconds_of(lambda: little + 1.0)


def _flops(
    size: ModelSize, config: TrainConfig, tokens: float, trained_tokens: float, squares: float
) -> float:
    """Forward is 2 per number and token; backward as much for what flows, and again for what is trained."""
    passes = 3 if config.method == "full" else 2
    again = 1 if config.gradient_checkpointing else 0
    body = 2 * size.active * tokens * (passes + again)
    attention = 4 * squares * size.hidden * size.layers * (3 + again)
    adapter = 0 if config.method == "full" else 2 * size.trained * tokens * (3 + again)
    return body + attention + adapter + 2 * size.head * trained_tokens * passes


def _weight_bytes(size: ModelSize, config: TrainConfig, itemsize: int) -> tuple[int, int]:
    """Bytes of what is frozen, and of what is trained with its gradient and optimizer state."""
    trained = _STATE_BYTES * size.trained
    if config.method == "full":
        return 0, trained
    if config.method == "qlora":
        return round(size.linear * _QUANTISED_BYTES + (size.parameters - size.linear) * itemsize), trained
    return size.parameters * itemsize, trained


def _activation_bytes(
    training: Sequence[Example], size: ModelSize, config: TrainConfig, itemsize: int
) -> int:
    """What the largest batch may keep: as many of the longest rows as stand in one, padded."""
    rows = config.per_device_train_batch_size
    longest = sorted((len(example.input_ids) for example in training), reverse=True)[:rows]
    trained = sum(sorted((example.trained_tokens for example in training), reverse=True)[:rows])
    hidden, keys, mlp = _KEPT.get(
        ("full" if config.method == "full" else "adapter", itemsize), _KEPT[("full", 4)]
    )
    per_layer = hidden * size.hidden + keys * size.keys + mlp * size.mlp
    per_token = size.layers * per_layer
    if config.gradient_checkpointing:  # of each layer its input, and one layer whole
        per_token = size.layers * size.hidden * itemsize + per_layer
    return longest[0] * len(longest) * per_token + trained * (size.head // size.hidden) * _LOGIT_BYTES


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear)


def _trained(linears: dict[str, tuple[int, ...]], config: TrainConfig) -> int:
    """Numbers of an adapter: rank x (in + out) of each target, and DoRA's magnitudes."""
    targets = linears
    if config.target_modules != (ALL_LINEAR,):
        hit = resolve_pattern(dict.fromkeys(config.target_modules, 1), linears)
        targets = {name: shape for name, shape in linears.items() if name in hit}
    ranks = resolve_pattern(config.ranks, targets)
    magnitude = 1 if config.method == "dora" else 0
    return sum(
        ranks.get(name, config.lora_r) * (shape[0] + shape[1]) + magnitude * shape[0]
        for name, shape in targets.items()
    )


def _idle_experts(model: Any, text: Any) -> int:
    """Numbers of a mixture's experts that a token does not pass."""
    count = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 0
    used = getattr(text, "num_experts_per_tok", None) or count
    held = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return held * (count - used) // count if count else 0
