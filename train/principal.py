"""PiSSA and OLoRA: the adapter begins as the base's own principal part, and the base is left as it is.

Both papers take s B0 A0 out of the weight W and train B A over what is left, W - s B0 A0 + s B A. Kept as
a weight, that rest is rounded to the base's dtype, and no adapter of rank 2r for the original W repairs
what is lost in bfloat16. Here the rest is never formed: the adapter has rank 2r from the first step,
s [B, -B0] [A; A0], of which the halves with A0 and B0 are held. So what is trained is what is served,
in every dtype, with every pattern and with rsLoRA, and a checkpoint holds all that a later step needs.
Weight decay pulls both halves alike, which is towards the base model, as with an ordinary LoRA.

PiSSA: Meng et al. 2024, arXiv:2404.02948; OLoRA: Büyükakyüz 2024, arXiv:2406.01775; the factors are those
of peft/tuners/lora/layer.py, `pissa_init` and `olora_init`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.errors import BadSetting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

ADAPTER = "default"  # PEFT's name for the only adapter
PRINCIPAL_INITS = ("pissa", "pissa_niter_4", "olora")
_HELD = "held_numbers"


def begin_at_principal(model: PeftModel, init: str) -> None:
    """Give every LoRA layer of `model`, made with twice the rank, its two halves.

    Raises:
        BadSetting: a module is smaller than the rank, or no linear layer.
    """
    import torch
    from peft.utils.integrations import dequantize_module_weight

    for name, layer in lora_layers(model):
        if ADAPTER not in layer.lora_A:
            rule = f"starts from linear layers, and {name} is none"
            raise BadSetting(f"--init-lora-weights {init}", rule, "Take it out of --target-modules.")
        weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
        weight = weight.T if layer.fan_in_fan_out else weight
        rank, scaling = layer.r[ADAPTER] // 2, layer.scaling[ADAPTER]
        if rank > min(weight.shape):
            rule = f"rank {rank} is more than {name} of shape {tuple(weight.shape)} has"
            fix = f"Lower --lora-r to {min(weight.shape)}, or give the module a rank with --rank-pattern."
            raise BadSetting(f"--init-lora-weights {init}", rule, fix)
        a, b = principal_factors(weight, rank, scaling, init)
        matrix_a, matrix_b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with torch.no_grad():
            matrix_a.copy_(torch.cat([a, a]))
            matrix_b.copy_(torch.cat([b, -b], dim=1))
        _hold_second_half(matrix_a, 0)
        _hold_second_half(matrix_b, 1)


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    """Name, as in the base model, and layer of every module with a LoRA."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def is_principal(model: PeftModel) -> bool:
    """Whether `begin_at_principal` was here."""
    return any(map(held, model.parameters()))


def held(parameter: torch.Tensor) -> int:
    """How many numbers of a trainable parameter get no gradient."""
    return int(getattr(parameter, _HELD, 0))


def principal_factors(
    weight: torch.Tensor, rank: int, scaling: float, init: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) in float32, of a weight (out, in)."""
    import torch

    if init == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if init == "pissa":
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=int(init.rpartition("_")[2]))
        vh = v.T
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def _hold_second_half(parameter: torch.Tensor, axis: int) -> None:
    """No gradient for the second half along `axis`; the parameter must be trained in place from now on."""
    half = parameter.shape[axis] // 2

    def hold(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.narrow(axis, half, half).zero_()
        return gradient

    parameter.register_hook(hold)
    setattr(parameter, _HELD, parameter.numel() // 2)


def balance(a: torch.Tensor, b: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Other factors, of the same shapes, of the same product: scaling * b @ a, up to float32.

    `a` is (rank, in), `b` (out, rank). A server rounds an adapter's factors to its own dtype. The halves of
    [B, -B0] [A; A0] are as large as the base's weights and nearly cancel, so their rounding would weigh
    as much as that of the base; these are as small as the change itself.
    """
    import torch

    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(scaling * r_b @ r_a.T, full_matrices=False)
    root = s.sqrt()
    new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
    new_a[: len(s)] = (root[:, None] * (vh @ q_a.T)).to(a.dtype)
    new_b[:, : len(s)] = ((q_b @ u) * root).to(b.dtype)
    return new_a, new_b
