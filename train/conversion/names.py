"""Which module a tensor of an adapter belongs to, whatever its trainer wrapped around the name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_WRAPPERS = ("base_model.model.", "base_model.", "_orig_mod.", "module.")  # PEFT, torch.compile, DDP
_OLD = {"lora_down": "lora_A", "lora_up": "lora_B"}
_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_[A-Za-z_]+|vera_lambda_[bd]|hada_\w+|lokr_\w+|alpha)"
    r"(?P<rest>(\.[\w-]+)*)"
)


def parse_name(tensor: str) -> tuple[str, str] | None:
    """Module and part, for example `("model.layers.0.self_attn.q_proj", "lora_A")`; None for other tensors.

    A bias of a part is a part of its own, `lora_B.bias`. The adapter's name within the part is left out.
    """
    match = _PART.fullmatch(tensor)
    if match is None:
        return None
    part = _OLD.get(match["part"], match["part"])
    return plain_name(match["module"]), f"{part}.bias" if match["rest"].endswith(".bias") else part


def plain_name(module: str) -> str:
    """The module's name without what wraps models."""
    while wrapper := next((known for known in _WRAPPERS if module.startswith(known)), None):
        module = module.removeprefix(wrapper)
    return module.replace("._orig_mod", "").replace(".module.", ".")


def names_in_base(modules: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Name in the adapter -> name in the base, where one ends in the other and only one does."""
    return {module: _name_in_base(module, known) for module in modules}


def _name_in_base(module: str, known: Collection[str]) -> str:
    if module in known:
        return module
    longer = [name for name in known if name.endswith(f".{module}")]
    shorter = [name for name in known if module.endswith(f".{name}")]
    return next((found[0] for found in (longer, shorter) if len(found) == 1), module)


def is_peft_name(tensor: str) -> bool:
    """Whether PEFT itself finds a tensor of that name when it loads the folder."""
    parsed = parse_name(tensor)
    return parsed is None or (
        tensor.startswith("base_model.model.")
        and f".{parsed[1].partition('.')[0]}" in tensor
        and plain_name(tensor) == tensor.removeprefix("base_model.model.")
        and ".default." not in tensor
    )
