"""Adapters whose change of each weight follows from their own file, without the base.

The formulas are those of peft/tuners/*/layer.py, `get_delta_weight`: LoRA (Hu et al. 2021), AdaLoRA (Zhang et
al. 2023), VeRA (Kopiczko et al. 2023), LoHa (Hyeon-Woo et al. 2021), LoKr (Yeh et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from train.conversion.factors import Factors
from train.conversion.names import names_in_base, parse_name, plain_name
from train.conversion.source import Source, full_model_advice
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.peft_config import resolve_pattern

Parts = Mapping[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Change:
    """What an adapter does to one module, as thin factors and, by its definition, to inputs (in, n).

    `is_vocabulary` where the module is an embedding, whose factors then stand for its weight (vocab, hidden)
    transposed, as PEFT names them. `scale` is a LoRA's scaling.
    """

    factors: Factors
    apply: Callable[[torch.Tensor], torch.Tensor]
    is_vocabulary: bool = False
    scale: float = 1.0  # which is in the factors


class NotFromFile(Exception):
    """The file alone does not say what the adapter changes; the text says why."""


def known_changes(source: Source, shapes: Shapes) -> dict[str, Change]:
    """Module -> change, of all modules in the file; `shapes` are the base's, if it is known.

    Raises:
        NotFromFile: the type or a feature of it needs the base.
        BadInput: tensors do not make whole modules.
    """
    make = _TYPES.get(source.peft_type)
    if make is None:
        raise NotFromFile(f"{source.peft_type} is computed from the base's weights")
    return make(source, _parts_by_module(source, shapes), shapes)


def _parts_by_module(source: Source, base_modules: Collection[str]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in source.tensors.items():
        if plain_name(name) in _SHARED:
            continue
        parsed = parse_name(name)
        if parsed is None:
            raise NotFromFile(f"{name} is a weight of the base's own")
        module, part = parsed
        found.setdefault(module, {})[part] = tensor.double()
    names = names_in_base(found, base_modules)
    return {names[module]: parts for module, parts in found.items()}


_SHARED = ("vera_A", "vera_B")
# Features of LoRA that change what it computes, and are not in A, B and the scaling.
_MORE_THAN_FACTORS = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "trainable_token_indices")


def _lora(source: Source, modules: Mapping[str, Parts], _: Shapes) -> dict[str, Change]:
    for feature in _MORE_THAN_FACTORS:
        if source.config.get(feature):
            raise NotFromFile(f"{feature} depends on the base's weights")
    scales = _scales(source.config, {name: _rank_of(name, parts) for name, parts in modules.items()})
    return {name: _lora_change(name, parts, scales[name]) for name, parts in modules.items()}


def _rank_of(module: str, parts: Parts) -> int:
    return int(_need(module, parts, "lora_embedding_A" if "lora_embedding_A" in parts else "lora_A").shape[0])


def _lora_change(module: str, parts: Parts, scale: float) -> Change:
    left = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "alpha"}
    for part in set(parts) - left:
        if part != "lora_B.bias":
            raise NotFromFile(f"{module} has {part}")
        if bool(parts[part].any()):
            rule = "adds a bias (lora_bias), and a LoRA in a server has none"
            raise BadInput(module, rule, full_model_advice("LORA"))
    kind = "lora_embedding_" if "lora_embedding_A" in parts else "lora_"
    a, b = _need(module, parts, f"{kind}A"), _need(module, parts, f"{kind}B")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        rule = f"has A {tuple(a.shape)} and B {tuple(b.shape)}, which do not fit"
        raise BadInput(module, rule, "Save the adapter with PEFT again.")
    if "alpha" in parts:  # trainers that keep alpha beside the weights
        scale = float(parts["alpha"]) / a.shape[0]
    return Change(Factors(a, scale * b), lambda x: scale * (b @ (a @ x)), kind != "lora_", scale)


def _scales(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Module -> alpha / rank, or for rsLoRA alpha / sqrt(rank) (Kalajdzievski 2023)."""
    alphas = resolve_pattern(config.get("alpha_pattern") or {}, list(ranks))
    usual = config.get("lora_alpha", config.get("alpha"))
    scales = {}
    for module, rank in ranks.items():
        alpha = alphas.get(module, usual)
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise BadInput("lora_alpha", f"must be a number, is {alpha!r}", "Restore the adapter's config.")
        scales[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def _adalora(source: Source, modules: Mapping[str, Parts], _: Shapes) -> dict[str, Change]:
    """B diag(E) A; PEFT divides alpha by the rank that it began with, even where fewer are left."""
    alpha, rank = source.config.get("lora_alpha"), source.config.get("init_r")
    if not isinstance(alpha, int | float) or not isinstance(rank, int):
        raise BadInput("adapter_config.json", "states no lora_alpha and init_r", "Restore it.")
    scale = (alpha if alpha > 0 else float(rank)) / (rank + 1e-5)
    found = {}
    for module, parts in modules.items():
        a, b, e = (_need(module, parts, f"lora_{part}") for part in "ABE")
        found[module] = _product(a * e, scale * b, a, b, e, scale)
    return found


def _product(
    left: torch.Tensor, right: torch.Tensor, a: torch.Tensor, b: torch.Tensor, e: torch.Tensor, scale: float
) -> Change:
    return Change(Factors(left, right), lambda x: scale * (b @ (e * (a @ x))))


def _vera(source: Source, modules: Mapping[str, Parts], shapes: Shapes) -> dict[str, Change]:
    """diag(b) B diag(d) A, with A and B shared by all modules and cut to each one's shape."""
    shared = {plain_name(name): tensor.double() for name, tensor in source.tensors.items()}
    if not set(_SHARED) <= set(shared):
        raise NotFromFile("its projections were not saved (save_projection=False)")
    found = {}
    for module, parts in modules.items():
        if module not in shapes:
            raise NotFromFile("the width of its modules is the base's")
        a, b = shared["vera_A"][:, : shapes[module][1]], shared["vera_B"][: shapes[module][0]]
        scale_b, scale_d = (_need(module, parts, f"vera_lambda_{part}")[:, None] for part in "bd")
        found[module] = _vera_change(a, b, scale_b, scale_d)
    return found


def _vera_change(a: torch.Tensor, b: torch.Tensor, scale_b: torch.Tensor, scale_d: torch.Tensor) -> Change:
    return Change(Factors(scale_d * a, scale_b * b), lambda x: scale_b * (b @ (scale_d * (a @ x))))


def _loha(source: Source, modules: Mapping[str, Parts], _: Shapes) -> dict[str, Change]:
    """(w1a w1b) * (w2a w2b), elementwise: of rank r^2, by products of all pairs of columns and rows."""
    ranks = {module: int(_need(module, parts, "hada_w1_b").shape[0]) for module, parts in modules.items()}
    scales, found = _scales(source.config, ranks), {}
    for module, parts in modules.items():
        if "hada_t1" in parts:
            raise BadInput(module, "is a convolution", "Only linear modules can be served.")
        w1a, w1b, w2a, w2b = (_need(module, parts, f"hada_w{name}") for name in ("1_a", "1_b", "2_a", "2_b"))
        b = (w1a[:, :, None] * w2a[:, None, :]).flatten(1)
        a = (w1b[:, None, :] * w2b[None, :, :]).flatten(0, 1)
        found[module] = _dense_change(Factors(a, scales[module] * b), w1a @ w1b * (w2a @ w2b), scales[module])
    return found


def _lokr(source: Source, modules: Mapping[str, Parts], _: Shapes) -> dict[str, Change]:
    """kron(w1, w2): of the rank of w1 times that of w2, by the Kronecker products of their factors."""
    ranks = resolve_pattern(source.config.get("rank_pattern") or {}, list(modules))
    usual = source.config.get("r")
    if not isinstance(usual, int):
        raise BadInput("r", f"must be a whole number, is {usual!r}", "Restore the adapter's config.")
    scales, found = _scales(source.config, {name: ranks.get(name, usual) for name in modules}), {}
    for module, parts in modules.items():
        if "lokr_t2" in parts:
            raise BadInput(module, "is a convolution", "Only linear modules can be served.")
        one, two = _lokr_factors(module, parts, "w1"), _lokr_factors(module, parts, "w2")
        both = Factors(torch.kron(one.a, two.a), scales[module] * torch.kron(one.b, two.b))
        found[module] = _dense_change(both, torch.kron(one.b @ one.a, two.b @ two.a), scales[module])
    return found


def _lokr_factors(module: str, parts: Parts, name: str) -> Factors:
    whole = parts.get(f"lokr_{name}")
    if whole is None:
        return Factors(_need(module, parts, f"lokr_{name}_b"), _need(module, parts, f"lokr_{name}_a"))
    if whole.shape[0] < whole.shape[1]:
        return Factors(whole, torch.eye(whole.shape[0], dtype=whole.dtype))
    return Factors(torch.eye(whole.shape[1], dtype=whole.dtype), whole)


def _dense_change(factors: Factors, dense: torch.Tensor, scale: float) -> Change:
    return Change(factors, lambda x: scale * (dense @ x))


def _need(module: str, parts: Parts, part: str) -> torch.Tensor:
    if part not in parts:
        raise BadInput(module, f"has no {part}", "Copy the adapter again, or save it with PEFT again.")
    return parts[part]


_TYPES: Mapping[str, Callable[[Source, Mapping[str, Parts], Shapes], dict[str, Change]]] = {
    "LORA": _lora,
    "ADALORA": _adalora,
    "VERA": _vera,
    "LOHA": _loha,
    "LOKR": _lokr,
}
