"""How the change of each module is had: from the adapter's file, or by PEFT's merge into the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from train.conversion.beginnings import begins_elsewhere, since_beginning
from train.conversion.factors import Factors, Spectrum, dense_spectrum, spectrum_of
from train.conversion.known import Change, NotFromFile, known_changes
from train.conversion.names import is_peft_name
from train.conversion.source import Source, full_model_advice, open_source
from train.conversion.through_peft import dense_changes
from train.model import load_base
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadInput, BadSetting

# What stands before the prompt or chooses among adapters is in no weight.
_NO_WEIGHTS = (
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"),
    *("CARTRIDGE", "XLORA", "POLY"),
)
# Features of LoRA that change more than weights, or the shape of the model.
_NO_LORA = ("layer_replication", "alora_invocation_tokens", "use_qalora", "arrow_config", "megatron_config")


@dataclass
class Plan:
    """`changes` are None where PEFT has to merge; `peft_can_load` whether it takes the folder as it is."""

    source: Source
    base: BaseModel | None
    method: str
    changes: Mapping[str, Change] | None
    is_plain: bool = False  # a LoRA already: its factors stay
    peft_can_load: bool = True
    vocabulary: set[str] = field(default_factory=set)

    def spectra(self) -> Iterator[tuple[str, Factors | Spectrum]]:
        """Module -> its change; fills `vocabulary` on the way."""
        if self.changes is not None:
            self.vocabulary |= {name for name, change in self.changes.items() if change.is_vocabulary}
            for name, change in sorted(self.changes.items()):
                yield name, change.factors if self.is_plain else spectrum_of(change.factors)
            return
        assert self.base is not None
        for name, dense, is_vocabulary in dense_changes(self.source.folder, self.base.name):
            self.vocabulary |= {name} if is_vocabulary else set()
            yield name, dense_spectrum(dense)


def make_plan(source: Source, base_model: str | None, initial_adapter: Path | None) -> Plan:
    """Choose; reads the base's config, and its weights only where an adapter began at a part of them.

    Raises:
        BadSetting: the base, or the adapter that it began as, has to be given.
        BadBaseModel: the base that was given cannot be read.
        BadInput: no LoRA is equal to what the adapter does, in no rank.
    """
    _require_possible(source)
    base = find_base(source, base_model)
    shapes = base.module_shapes() or {} if base is not None else {}
    try:
        changes = known_changes(source, shapes)
    except NotFromFile as reason:
        if base is None:
            rule = f"is needed: {reason}"
            raise BadSetting("--base-model", rule, "Give the base that it was trained on.") from None
        _require_whole_weights(base)
        return Plan(source, base, f"PEFT's merge into the base, less the base ({reason})", None)
    _require_named_modules(changes, source)
    if source.peft_type != "LORA":
        return Plan(source, base, "from its own file", changes)
    as_saved = all(is_peft_name(name) for name in source.tensors)
    if not begins_elsewhere(source):
        return Plan(source, base, _tidied(source, as_saved), changes, is_plain=True, peft_can_load=as_saved)
    if initial_adapter is None:
        weights = None if base is None else load_base(base.name, torch.float32)
        changes = since_beginning(changes, source, None, weights, shapes)
        return Plan(source, base, "less what it took out of the base", changes, peft_can_load=as_saved)
    with open_source(initial_adapter) as initial:
        changes = since_beginning(changes, source, initial, None, shapes)
    return Plan(source, base, "less what it began as", changes, peft_can_load=False)


def _tidied(source: Source, as_saved: bool) -> str:
    done = ["a LoRA already: scaling folded into B"]
    done += [] if as_saved else ["tensors renamed"]
    done += ["pickle to safetensors"] if source.is_pickle else []
    return ", ".join(done)


def find_base(source: Source, stated: str | None) -> BaseModel | None:
    """The stated base, else the one that the config names if it is at hand; nothing is downloaded for it."""
    if stated:
        return read_base_model(stated)
    named = source.config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return None
    try:
        return read_base_model(named, offline=True)
    except BadBaseModel:
        return None


def _require_possible(source: Source) -> None:
    from peft.utils.peft_types import PeftType

    known = sorted(kind.value for kind in PeftType if kind.value not in _NO_WEIGHTS)
    if source.peft_type in _NO_WEIGHTS:
        rule = f"is {source.peft_type}, which changes no weight of the base, so no LoRA is equal to it"
        raise BadInput(str(source.folder), rule, "Train a LoRA.")
    if source.peft_type not in known:
        rule = f"is of PEFT type {source.peft_type}, which this PEFT does not know"
        raise BadInput(str(source.folder), rule, f"Known are {', '.join(known)}.")
    for feature in _NO_LORA:
        if source.config.get(feature):
            raise BadInput(
                feature, "does more than change weights, so no LoRA is equal to it", "Train an ordinary LoRA."
            )
    if source.config.get("target_parameters"):
        raise BadInput(
            "target_parameters",
            "names weights of experts, which are not converted",
            full_model_advice("LORA"),
        )


def _require_whole_weights(base: BaseModel) -> None:
    if base.config.get("quantization_config"):
        rule = "is quantised, so what an adapter changes in it cannot be told from its rounding"
        raise BadBaseModel(base.name, rule, "Give the model that it was quantised from.")


def _require_named_modules(changes: Mapping[str, Change], source: Source) -> None:
    if not changes:
        raise BadInput(str(source.folder), "holds no module of an adapter", "Copy its weights again.")
