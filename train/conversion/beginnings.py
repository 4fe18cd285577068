"""LoRAs that began as a part of the base's weights: they change what they became, less what they began as.

PiSSA and OLoRA begin at factors of the base's own weight, CorDA and LoRA-GA at factors that depend on data.
Each takes that part out of the base, s B0 A0, so over the unchanged base the adapter is s (B A - B0 A0), of
twice the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from train.conversion.factors import Factors
from train.conversion.known import Change, NotFromFile, Shapes, known_changes
from train.conversion.source import Source
from train.principal import principal_factors
from vllm_lora_ext.errors import BadInput, BadSetting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FROM_BASE = ("pissa", "olora")  # the same at every start; pissa_niter_N is random
_FROM_DATA = ("corda", "lora_ga")


def begins_elsewhere(source: Source) -> bool:
    """Whether the adapter counts from another base than the one it names."""
    init = source.config.get("init_lora_weights")
    name = init.lower() if isinstance(init, str) else ""
    if name == "loftq":
        rule = "began over a base that LoftQ had quantised, and no LoRA of the unchanged base is equal to it"
        raise BadInput(
            str(source.folder), rule, "Serve it over that base, or `vllm-lora merge` it into that base."
        )
    return name.startswith((*_FROM_BASE, *_FROM_DATA))


def since_beginning(
    changes: Mapping[str, Change],
    source: Source,
    initial: Source | None,
    base: PreTrainedModel | None,
    shapes: Shapes,
) -> dict[str, Change]:
    """The changes less what the adapter began with, from the adapter as it was first saved, or from the base.

    Raises:
        BadSetting: neither says what it began with.
        BadInput: the initial adapter is another one's.
    """
    if initial is not None:
        first = _factors_in(initial, shapes)
    else:
        first = {name: _of_base(name, change, source, base) for name, change in changes.items()}
    if set(first) != set(changes):
        odd = sorted(set(first) ^ set(changes))[0]
        raise BadInput(
            "--initial-adapter", f"is of other modules, for example {odd}", "Give the one it began as."
        )
    return {name: _less(change, first[name]) for name, change in changes.items()}


def _factors_in(initial: Source, shapes: Shapes) -> dict[str, Factors]:
    try:
        return {name: change.factors for name, change in known_changes(initial, shapes).items()}
    except NotFromFile as error:
        rule = f"is no LoRA to begin with ({error})"
        raise BadInput(
            "--initial-adapter", rule, "Give the adapter as it was before its first step."
        ) from None


def _of_base(module: str, change: Change, source: Source, base: PreTrainedModel | None) -> Factors:
    init = str(source.config["init_lora_weights"]).lower()
    if init not in _FROM_BASE:
        rule = f"is needed: where {init} began was random or depends on data"
        raise BadSetting("--initial-adapter", rule, "Give the folder that was saved before the first step.")
    if base is None:
        rule = f"or --initial-adapter is needed: {init} began at factors of the base's weights"
        raise BadSetting("--base-model", rule, "Give the base that it was trained on.")
    weight = base.get_submodule(module).weight.detach().float()
    if source.config.get("fan_in_fan_out"):
        weight = weight.T
    a, b = principal_factors(weight, change.factors.rank, 1.0, init)
    # PiSSA divides what it begins with by the scaling, OLoRA does not.
    return Factors(a.double(), b.double() * (change.scale if init == "olora" else 1.0))


def _less(change: Change, first: Factors) -> Change:
    return Change(
        change.factors.minus(first), lambda x: change.apply(x) - first.apply(x), change.is_vocabulary
    )
