"""Several adapters become one change, each weight by itself and some rows of it at a time.

Names and arithmetic are those of PEFT's `add_weighted_adapter`, and its own functions do the work
(peft/utils/merge_utils.py). What they work on is not the same. PEFT has to end with A and B of a LoRA, so it
combines the A's with each other and the B's with each other, or cuts to a rank: of its `linear` even the
sum is wrong, (B1 + B2)(A1 + A2) has cross terms. A merged model needs no rank, so what is combined here are
the changes of the weights themselves, as in the papers (TIES: arXiv:2306.01708, DARE: arXiv:2311.03099),
which is what PEFT's `*_svd` compute before their cut. `cat` is exact in PEFT as well, and is `linear` here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from train.merge_changes import Change
from vllm_lora_ext.errors import BadSetting

if TYPE_CHECKING:
    import torch

    from train.merge_base import Stored

COMBINATIONS = ("linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune")
_SPARSE = COMBINATIONS[2:]
_BLOCK_ELEMENTS = 1 << 19  # float32 of 2 MB: a few of them stay in the processor's cache, or near it
_BUCKETS = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined: one weight each, and for the sparse ones the share of numbers that is kept.

    `seed` decides what DARE drops.

    Raises:
        BadSetting: a value that makes no sense.
    """

    weights: tuple[float, ...] = (1.0,)
    combination: str = "linear"
    density: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.combination not in COMBINATIONS:
            rule = f"must be one of {', '.join(COMBINATIONS)}, is {self.combination!r}"
            raise BadSetting("--combination", rule, "Choose one of them.")
        if self.combination in _SPARSE and (self.density is None or not 0 < self.density <= 1):
            rule = f"must be above 0 and at most 1 for {self.combination}, is {self.density}"
            raise BadSetting("--density", rule, "Say which share of each adapter's changes is kept: 0.5.")
        if self.combination not in _SPARSE and self.density is not None:
            rule = f"says nothing to {self.combination}"
            raise BadSetting("--density", rule, f"Leave it out, or choose {', '.join(_SPARSE)}.")
        if any(not -1e6 <= weight <= 1e6 or weight == 0 for weight in self.weights):
            raise BadSetting("--weights", f"must be numbers other than 0, are {self.weights}", "Change them.")

    @property
    def is_plain(self) -> bool:
        """Whether the changes are just added."""
        return self.combination in ("linear", "cat")

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


def blocks(stored: Stored) -> Iterator[tuple[int, int]]:
    """First and last row of pieces of a tensor, small enough to have several of them in memory."""
    width = max(1, stored.row_bytes)
    step = max(1, 2 * _BLOCK_ELEMENTS // width)
    for start in range(0, stored.rows, step):
        yield start, min(stored.rows, start + step)


@dataclass
class Combined:
    """All changes of one weight: `changes` with the weight of each."""

    name: str
    stored: Stored
    changes: Sequence[tuple[float, Change]]
    recipe: Recipe

    def __post_init__(self) -> None:
        self._least: list[float] = []
        if self.recipe.combination in ("ties", "magnitude_prune"):
            self._least = [self._threshold(change) for _, change in self.changes]

    def merged(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """The rows from `start` on, `base` (rows, width) as they are in the base, with every change."""
        (weight, change), *others = self.changes
        if self.recipe.is_plain and not others and weight == 1:
            return change.applied(start, base)
        return base.add_(self._together(start, base))

    def _together(self, start: int, base: torch.Tensor) -> torch.Tensor:
        import torch
        from peft.utils import merge_utils

        deltas = [change.delta(start, base) for _, change in self.changes]
        weights = torch.tensor([weight for weight, _ in self.changes])
        deltas = self._thinned(start, deltas)
        if self.recipe.combination not in ("ties", "dare_ties"):
            total: torch.Tensor = merge_utils.task_arithmetic(deltas, weights)
            return total
        stacked = torch.stack(deltas)
        agreed = merge_utils.calculate_majority_sign_mask(stacked)
        weighted = stacked * merge_utils.reshape_weight_task_tensors(stacked, weights)
        elected: torch.Tensor = merge_utils.disjoint_merge(weighted, agreed)
        return elected

    def _thinned(self, start: int, deltas: list[torch.Tensor]) -> list[torch.Tensor]:
        """What is left of each, if something is dropped: at random, or all that is small."""
        density = self.recipe.density
        if density is None or density >= 1:
            return deltas
        if self._least:
            return [delta * (delta.abs() >= least) for delta, least in zip(deltas, self._least, strict=True)]
        import torch
        from peft.utils.merge_utils import random_pruning

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed(start))
            return [random_pruning(delta, density, rescale=True) for delta in deltas]

    def _seed(self, start: int) -> int:
        """Of each piece of its own, so that a merge that goes on later drops the same numbers."""
        text = f"{self.recipe.seed} {self.name} {start}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])

    def _threshold(self, change: Change) -> float:
        """The size of the smallest number that is kept of a change.

        Found by counting in two passes, by the upper and then by the lower 16 bits: floats without sign are
        in the order of their bits. So nothing has to be sorted, or be there as a whole.
        """
        import torch

        assert self.recipe.density is not None
        count = int(self.recipe.density * self.stored.rows * (self.stored.row_bytes // self._item_bytes()))
        if not count:
            return float("inf")
        upper, count = self._nth_largest(change, count, lambda bits: bits >> 16)
        lower, _ = self._nth_largest(change, count, lambda bits: bits[bits >> 16 == upper] & 0xFFFF)
        found = torch.tensor([(upper << 16) | lower], dtype=torch.int32)
        return float(found.view(torch.float32)[0])

    def _nth_largest(
        self, change: Change, count: int, key: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[int, int]:
        """The bucket that holds the number of rank `count` from above, and its rank in that bucket."""
        import torch

        counts = torch.zeros(_BUCKETS, dtype=torch.int64)
        for start, stop in blocks(self.stored):
            bits = change.delta(start, self.stored.read(start, stop)).abs_().view(torch.int32).flatten()
            counts += torch.bincount(key(bits), minlength=_BUCKETS)
        above = counts.flip(0).cumsum(0)
        place = int((above < count).sum())
        return _BUCKETS - 1 - place, count - (int(above[place - 1]) if place else 0)

    def _item_bytes(self) -> int:
        from vllm_lora_ext.tensor_file import ITEM_BYTES

        return ITEM_BYTES[self.stored.place.spec.dtype]
