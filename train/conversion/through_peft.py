"""What any other adapter changes: PEFT merges it into the base, and the difference is taken.

PEFT's own code says what its methods compute; here is only the subtraction, in float64, one module at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from train.conversion.source import full_model_advice
from train.model import attach_adapter, first_line, load_base
from vllm_lora_ext.errors import BadInput

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_ROUNDED = 1e-9  # of a weight: less is no change


def dense_changes(folder: Path, base_model: str) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Module, its change (out, in) in float64, and whether it is an embedding, of all modules that change.

    The base is held twice in float32, and one module in float64.

    Raises:
        BadInput: PEFT cannot load or merge the adapter, or it changes what no LoRA can.
    """
    base = load_base(base_model, torch.float32)
    _untie(base)
    before = {name: tensor.detach().clone() for name, tensor in base.named_parameters(remove_duplicate=False)}
    model = attach_adapter(base, folder)
    beyond = []
    for name, tensor in _merged(model, folder):
        original = before.pop(name, None)
        if original is None:  # the adapter's own, or seen before
            continue
        if original.shape != tensor.shape:
            beyond.append(name)
            continue
        change = tensor.double() - original.double()
        if float(change.norm()) <= _ROUNDED * float(original.double().norm()):
            continue
        module, _, kind = name.rpartition(".")
        if kind != "weight" or change.ndim != 2:
            beyond.append(name)
            continue
        layer = model.get_base_model().get_submodule(module)
        is_embedding = _is_embedding(layer)  # whose weight lies (vocab, hidden)
        yield module, change.T if is_embedding or _is_transposed(layer) else change, is_embedding
    if beyond:
        rule = f"changes what no LoRA can, for example {beyond[0]} ({len(beyond)} in all)"
        raise BadInput(str(folder), rule, full_model_advice(model.active_peft_config.peft_type.value))


def _untie(base: PreTrainedModel) -> None:
    """PEFT merges in place; what an adapter adds to a tied embedding is not added to the head."""
    head = base.get_output_embeddings()
    if head is not None and base.config.tie_word_embeddings:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)


_WITHIN = (".base_layer", ".modules_to_save.default", ".original_module", ".token_adapter")


def _merged(model: PeftModel, folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by the base's own names, with what the adapter puts in their place; layers of PEFT's first."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inner = model.get_base_model()
    layers = {name: one for name, one in inner.named_modules() if isinstance(one, BaseTunerLayer)}
    kind = model.active_peft_config.peft_type.value
    if not layers and not any(isinstance(one, AuxiliaryTrainingWrapper) for one in inner.modules()):
        rule = f"{kind} changes no weight of the base but what goes through it, which no LoRA can"
        raise BadInput(str(folder), rule, "Train a LoRA.")
    for name, layer in layers.items():
        try:
            layer.double().merge()
        except Exception as error:  # each of PEFT's types has its own way of not being able to
            rule = f"{kind} cannot be merged into one weight ({first_line(error)})"
            raise BadInput(str(folder), rule, "Train a LoRA.") from error
        yield from _by_base_names(layer, f"{name}.")
        layer.float()
    yield from _by_base_names(inner)


def _by_base_names(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """What replaces a weight comes before the weight that it replaces."""
    found = [(prefix + name, one.detach()) for name, one in module.named_parameters(remove_duplicate=False)]
    for full_name, tensor in sorted(found, key=lambda pair: ".original_module." in pair[0]):
        name = full_name
        for within in _WITHIN:
            name = name.replace(f"{within}.", ".")
        yield name, tensor


def _is_transposed(layer: torch.nn.Module) -> bool:
    return bool(getattr(layer, "fan_in_fan_out", False))


def _is_embedding(layer: torch.nn.Module) -> bool:
    inner = getattr(layer, "base_layer", getattr(layer, "original_module", layer))
    return isinstance(inner, torch.nn.Embedding)
