"""Frozen value types that the rest of the package speaks in. No I/O, no heavy import."""

from __future__ import annotations

import os
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


@dataclass(frozen=True)
class Finding:
    """One thing that admission has to say: which item breaks which rule, and the fix."""

    code: str
    item: str
    rule: str
    fix: str
    severity: Severity = Severity.REFUSED

    def __str__(self) -> str:
        return f"[{self.code}] {self.item}: {self.rule}. {self.fix}"


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as safetensors writes it, for example `BF16`) and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterSpec:
    """What a PEFT folder says about itself, before anybody judged it.

    `rank` is the value of `r`; `rank_pattern` holds the modules that differ, by
    dotted suffix of their names, as PEFT applies it.
    """

    name: str
    path: Path
    base_model: str | None
    rank: int
    tensors: tuple[TensorSpec, ...]
    size_bytes: int
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    @property
    def max_rank(self) -> int:
        """The largest rank that the engine has to hold for this adapter."""
        return max([self.rank, *self.rank_pattern.values()])

    def rank_of(self, module: str) -> int:
        """Rank of one module: the pattern whose key is a dotted suffix of its name, else `rank`."""
        for suffix, rank in self.rank_pattern.items():
            if module == suffix or module.endswith("." + suffix):
                return rank
        return self.rank


@dataclass(frozen=True)
class EngineLimits:
    """What the engine has room for."""

    max_lora_rank: int = ALLOWED_MAX_LORA_RANKS[-1]


def folder_name(path: Path) -> str:
    """The name that a folder is asked by: its own or its link's, never that of what a link points to."""
    return Path(os.path.abspath(path)).name  # noqa: PTH100  resolve() would follow the link


def allowed_rank(rank: int) -> int | None:
    """The smallest rank vLLM can allocate that holds `rank`; None if there is none."""
    return next((allowed for allowed in ALLOWED_MAX_LORA_RANKS if allowed >= rank), None)
