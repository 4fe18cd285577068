"""What of a PEFT model goes into an adapter folder: a clean config and the tensors, as vLLM takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.principal import ADAPTER, balance, is_principal

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def adapter_config(model: PeftModel) -> dict[str, Any]:
    """The content of `adapter_config.json`, in one order only, so that equal runs write equal bytes.

    An adapter that began as PiSSA or OLoRA is a plain LoRA of twice the rank, whose scaling is in its
    factors: every alpha is its rank.
    """
    config: dict[str, Any] = model.peft_config[ADAPTER].to_dict()
    config["inference_mode"] = True
    if is_principal(model):
        alphas = {"lora_alpha": config["r"], "alpha_pattern": dict(config["rank_pattern"])}
        config |= {**alphas, "use_rslora": False, "init_lora_weights": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(config.items())}


def adapter_shapes(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of what `adapter_tensors` will give; nothing is copied."""
    return {name: tuple(tensor.shape) for name, tensor in _state(model).items()}


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """Tensor name -> tensor, in float32 on the CPU.

    Of PiSSA and OLoRA the two halves become factors of their difference, which is what an unchanged base
    needs (see `train.principal`).
    """
    import torch

    tensors = {
        name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
        for name, tensor in sorted(_state(model).items())
    }
    if is_principal(model):
        for name in [name for name in tensors if name.endswith(_A)]:
            stem = name.removesuffix(_A)
            scaling = model.get_submodule(stem).scaling[ADAPTER]
            tensors[stem + _A], tensors[stem + _B] = balance(tensors[stem + _A], tensors[stem + _B], scaling)
    return tensors


_A, _B = ".lora_A.weight", ".lora_B.weight"


def _state(model: PeftModel) -> Mapping[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # No copy of the base's embedding beside an adapter that targets it: nothing was added to it.
    state: Mapping[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state
