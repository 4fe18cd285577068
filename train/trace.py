"""One forward pass, looked at: how large is what each module of the base puts out, and what the adapter adds?

Sizes are root mean squares over tokens and features. Hooks read and change nothing.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.answers import LocalChat
from vllm_lora_ext.errors import BadInput, BadSetting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import BatchEncoding, PreTrainedTokenizerBase

_TOP = 5
_WRAPPED = "base_model.model."  # what PEFT puts in front of the base's names
_LAYER = re.compile(r"(?P<layers>.+?)\.(?P<number>\d+)(\.|$)")


@dataclass(frozen=True)
class ModuleTrace:
    """One module: `base` is the size of its base's output, `share` of what the adapter adds to it.

    Both are for the same input, which layers before have changed. `ratio` is share / base, None where the
    base puts out nothing. `layer` is None outside the layers.
    """

    module: str
    layer: int | None
    base: float
    share: float
    ratio: float | None


@dataclass(frozen=True)
class StreamTrace:
    """The residual stream behind one layer: its size without the adapter, with it, and of the difference."""

    module: str
    layer: int
    base: float
    adapter: float
    moved: float


@dataclass(frozen=True)
class NextToken:
    """A token that may come next, with its probability."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Trace:
    """What one pass over `tokens` tokens showed.

    `divergence` is KL(adapter || base) of the next token, in nats. `untraced` are modules of which this pass
    says nothing: the text asked for other experts, or PEFT changes their weights while they run.
    """

    prompt: str
    tokens: int
    modules: tuple[ModuleTrace, ...]
    streams: tuple[StreamTrace, ...]
    base_next: tuple[NextToken, ...]
    adapter_next: tuple[NextToken, ...]
    divergence: float
    untraced: tuple[str, ...] = ()


def trace_adapter(
    adapter_dir: Path, text: str, base_model: str | None = None, allow: Collection[str] = ()
) -> Trace:
    """Ask base and adapter the same prompt: `text` as the user's message in the adapter's template.

    Raises:
        BadSetting: the text is empty, or longer than the base can read.
        AdapterRefused, BadBaseModel, BadInput: as `LocalChat`; also if what is computed is no number.
    """
    if not text.strip():
        raise BadSetting("--trace", "has no text", 'Give some, for example --trace "Who are you?".')
    chat = LocalChat(adapter_dir, base_model, allow)
    inputs = chat.prompt(text, chat.adapter_template)
    most = getattr(chat.model.config, "max_position_embeddings", None)
    if most and inputs["input_ids"].shape[1] > most:
        rule = f"has {inputs['input_ids'].shape[1]} tokens, the base reads {most}"
        raise BadSetting("--trace", rule, "Give a shorter text.")
    trace = trace_model(chat.model, chat.tokenizer, inputs)
    _check_numbers(adapter_dir, trace)
    return trace


def trace_model(model: PeftModel, tokenizer: PreTrainedTokenizerBase, inputs: BatchEncoding) -> Trace:
    """Run a prompt of shape (1, tokens) once with the adapter switched off and once with it on."""
    import torch

    with torch.inference_mode():
        with model.disable_adapter(), _watch_streams(model) as base_streams:
            base_logits = model(**inputs).logits[0, -1].double()
        with _watch_streams(model) as streams, _watch_modules(model) as meters:
            logits = model(**inputs).logits[0, -1].double()
        base, adapter = torch.log_softmax(base_logits, -1), torch.log_softmax(logits, -1)
        terms = adapter.exp() * (adapter - base)
        # A token that cannot come, with logit -inf, adds nothing; logits that are no numbers stay none.
        is_number = not (adapter.isnan().any() or base.isnan().any())
    return Trace(
        prompt=str(tokenizer.decode(inputs["input_ids"][0])),
        tokens=inputs["input_ids"].shape[1],
        modules=tuple(meter.trace(name) for name, meter in meters.items() if meter.count),
        streams=tuple(_stream(name, base_streams[name], streams[name]) for name in streams),
        base_next=_top(base, tokenizer),
        adapter_next=_top(adapter, tokenizer),
        divergence=float(terms.nansum()) if is_number else math.nan,
        untraced=tuple(name for name, meter in meters.items() if not meter.count),
    )


@dataclass
class _Meter:
    """Sums of squares of one module's outputs, over all its calls."""

    count: int = 0
    base: float = 0.0
    share: float = 0.0
    waiting: list[torch.Tensor] = field(default_factory=list)

    def see_base(self, module: object, args: object, output: Any) -> None:
        """The base's own output, kept until the module around it has ended."""
        self.waiting = [_tensor(output)]

    def see_whole(self, module: object, args: object, output: Any) -> None:
        """Base and adapter: the difference is the adapter's share, whatever kind of adapter it is."""
        if not self.waiting:
            return
        base, whole = self.waiting.pop(), _tensor(output)
        self.count += base.numel()
        self.base += _squares(base)
        self.share += _squares(whole.float() - base.float())

    def trace(self, name: str) -> ModuleTrace:
        base, share = (math.sqrt(total / self.count) for total in (self.base, self.share))
        match = _LAYER.match(name)
        ratio = share / base if base else None
        return ModuleTrace(name, int(match["number"]) if match else None, base, share, ratio)


@contextlib.contextmanager
def _watch_modules(model: PeftModel) -> Iterator[dict[str, _Meter]]:
    """A meter on each module that has an adapter, by the base's name of it."""
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer

    meters: dict[str, _Meter] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if not isinstance(module, BaseTunerLayer):
                continue
            meter = meters[name.removeprefix(_WRAPPED)] = _Meter()
            if isinstance(module, ParamWrapper):
                continue  # its base runs on weights that hold the adapter already
            hooks.callback(module.get_base_layer().register_forward_hook(meter.see_base).remove)
            hooks.callback(module.register_forward_hook(meter.see_whole).remove)
        yield meters


@contextlib.contextmanager
def _watch_streams(model: PeftModel) -> Iterator[dict[str, torch.Tensor]]:
    """What leaves each layer, by its name; layers are the items of the lists that adapted modules lie in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    lists = dict.fromkeys(match["layers"] for name in names if (match := _LAYER.match(name)))
    streams: dict[str, torch.Tensor] = {}

    def see(name: str, module: object, args: object, output: Any) -> None:
        streams[name] = _tensor(output).float().cpu()

    with contextlib.ExitStack() as hooks:
        for layers in lists:
            for number, layer in model.get_submodule(layers).named_children():
                name = f"{layers}.{number}".removeprefix(_WRAPPED)
                hooks.callback(layer.register_forward_hook(functools.partial(see, name)).remove)
        yield streams


def _stream(name: str, base: torch.Tensor, adapter: torch.Tensor) -> StreamTrace:
    match = _LAYER.match(name)
    layer = int(match["number"]) if match else 0
    return StreamTrace(name, layer, _size(base), _size(adapter), _size(adapter - base))


def _tensor(output: Any) -> torch.Tensor:
    """A module's output; of several, the first is what the next one reads."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _squares(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())


def _size(tensor: torch.Tensor) -> float:
    return math.sqrt(_squares(tensor) / tensor.numel())


def _top(log_probabilities: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[NextToken, ...]:
    values, ids = log_probabilities.exp().topk(min(_TOP, len(log_probabilities)))
    return tuple(
        NextToken(token, str(tokenizer.decode([token])), value)
        for token, value in zip(ids.tolist(), values.tolist(), strict=True)
    )


def _check_numbers(adapter_dir: Path, trace: Trace) -> None:
    """Raises BadInput that names the first place where something is no number."""
    fix = "`vllm-lora validate` looks at its weights; so may a base be damaged."
    places = [(item.module, item.base + item.share) for item in trace.modules]
    places += [(item.module, item.base + item.adapter) for item in trace.streams]
    for place, size in [*places, ("the next token", trace.divergence)]:
        if not math.isfinite(size):
            raise BadInput(str(adapter_dir), f"computes NaN or infinity in {place}", fix)
