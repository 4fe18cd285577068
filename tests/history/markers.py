"""Adapters that say two words of their own, whatever they are asked, so that an answer tells its version.

Each has rank 1 and disturbs every layer; in the last one it adds a vector to the hidden state that
outweighs all else and points to one word, or turned round to another. See `engine.isolation`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.intake import admit
from vllm_lora_ext.store import AdapterStore

LEAST_LEAD = 0.4  # in natural logarithms; what float32 rounds is 10,000 times smaller
# A and B each; against hidden states of about 1, also where a prompt is nearly at a right angle to A.
_STRENGTH = 1e4
_FIRST_WORD = 16  # the first are in the prompts


@dataclass(frozen=True)
class Marker:
    """A version: its folder, the first 12 digits of its digest, and its words."""

    name: str
    folder: Path
    version: str
    words: tuple[int, int]


class Markers:
    """Makes versions for one base; each has words that no other has."""

    def __init__(self, base: Path, folder: Path) -> None:
        import torch
        from safetensors.torch import load_file

        self._base, self._folder = base, folder
        self._shapes = read_base_model(str(base)).module_shapes() or {}
        weights = load_file(base / "model.safetensors")
        self._embedding: Any = weights["model.embed_tokens.weight"].float()
        assert bool((weights["model.norm.weight"] == 1).all()), "the last norm scales nothing"
        self._last = max(name for name in self._shapes if name.endswith("down_proj"))
        self._store = AdapterStore(folder / "store")
        self._vectors: Any = None
        self._pairs = self._strong_pairs(torch)
        self._numbers = itertools.count()  # versions are made in several threads

    def _strong_pairs(self, torch: Any) -> list[tuple[int, int]]:
        """Pairs of words whose direction puts them clearly before all others."""
        ups = torch.arange(_FIRST_WORD, len(self._embedding) - 1, 2)
        vectors = self._embedding[ups] - self._embedding[ups + 1]
        vectors /= vectors.norm(dim=1, keepdim=True)
        logits = self._embedding @ vectors.t() * self._embedding.shape[1] ** 0.5
        lead = torch.minimum(_lead(torch, logits, ups), _lead(torch, -logits, ups + 1))
        strong = lead >= LEAST_LEAD
        self._vectors = vectors[strong]
        return [(int(up), int(up) + 1) for up in ups[strong]]

    def __len__(self) -> int:
        """How many there can be."""
        return len(self._pairs)

    def make(self, name: str) -> Marker:
        """A new version for `name`."""
        import torch
        from safetensors.torch import save_file

        number = next(self._numbers)
        chance = torch.Generator().manual_seed(number)

        def unit(rows: int, columns: int) -> Any:
            return torch.randn(rows, columns, generator=chance) / (rows * columns) ** 0.5

        tensors = {}
        for module, (out_features, in_features) in self._shapes.items():
            a, b = unit(1, in_features), unit(out_features, 1)
            if module == self._last:
                a, b = a * _STRENGTH, self._vectors[number].unsqueeze(1) * _STRENGTH
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
        folder = self._folder / f"{number}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(self._base),
            "r": 1,
            "lora_alpha": 1,
            "bias": "none",
            "target_modules": sorted({module.rsplit(".", 1)[-1] for module in self._shapes}),
        }
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        admitted = admit(folder, self._store)
        admitted.version.release()
        return Marker(name, folder, admitted.version.digest[:12], self._pairs[number])


def _lead(torch: Any, logits: Any, words: Any) -> Any:
    """For each column of `logits`, how far its word is before the best other."""
    columns = torch.arange(logits.shape[1])
    others = logits.clone()
    others[words, columns] = -torch.inf
    return logits[words, columns] - others.max(dim=0).values
