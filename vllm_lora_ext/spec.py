"""Frozen value types that the rest of the package speaks in. No I/O, no heavy import."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

# The ranks for which vLLM allocates slots (vllm/config/lora.py, MaxLoRARanks).
ALLOWED_MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


class Severity(StrEnum):
    """What a finding means for the adapter."""

    REFUSED = "refused"
    UNPROVEN = "unproven"  # we cannot judge it; the engine decides
    WARNING = "warning"  # served, and worth a look
    NOTE = "note"  # for the record


@dataclass(frozen=True)
class Finding:
    """One thing that admission has to say: which item breaks which rule, and the fix."""

    code: str
    item: str
    rule: str
    fix: str
    severity: Severity = Severity.REFUSED

    def __str__(self) -> str:
        return f"[{self.code}] {self.item}: {self.rule}. {self.fix}".rstrip()


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as safetensors writes it, for example `BF16`) and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterSpec:
    """What a PEFT folder says about itself, before anybody judged it.

    `rank` and `alpha` hold for every module that is not in `ranks` or `alphas` (module -> value, the
    config's patterns applied). Modules are named as in the base model, without PEFT's prefix.
    """

    name: str
    path: Path
    base_model: str | None
    rank: int
    alpha: float
    tensors: tuple[TensorSpec, ...]
    size_bytes: int
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    heads: tuple[str, ...] = ()  # modules that the adapter brings whole
    target_parameters: tuple[str, ...] = ()

    @property
    def max_rank(self) -> int:
        """The largest rank that the engine has to hold for this adapter."""
        return max([self.rank, *self.ranks.values()])

    def rank_of(self, module: str) -> int:
        """Rank of one module, (rank, in_features) is the shape of its A."""
        return self.ranks.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """What B(Ax) is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        rank = self.rank_of(module)
        return self.alphas.get(module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


@dataclass(frozen=True)
class EngineLimits:
    """What the engine has room for."""

    max_lora_rank: int = ALLOWED_MAX_LORA_RANKS[-1]


def last_part(base_model: str) -> str:
    """A base model's name as it may be shown: a hub id whole, of a path its last part only."""
    is_path = base_model.startswith(("/", ".", "~")) or "\\" in base_model or base_model.count("/") > 1
    name = re.split(r"[/\\]", base_model.rstrip("/\\"))[-1] if is_path else base_model
    return printable(name)[:80]


def printable(text: str) -> str:
    """Somebody else's text as it may stand on a terminal, in a log and in JSON: printable, whole."""
    return text if text.isprintable() else repr(text)


def folder_name(path: Path) -> str:
    """The name that a folder is asked by: its own or its link's, never that of what a link points to."""
    return Path(os.path.abspath(path)).name  # noqa: PTH100  resolve() would follow the link


def allowed_rank(rank: int) -> int | None:
    """The smallest rank vLLM can allocate that holds `rank`; None if there is none."""
    return next((allowed for allowed in ALLOWED_MAX_LORA_RANKS if allowed >= rank), None)
