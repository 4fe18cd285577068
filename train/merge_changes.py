"""What an adapter does to a weight, some rows at a time, in float32.

A weight has shape (rows, width). Every change can say what it adds to any rows of it, so that no more of a
model than a few rows is ever in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from train.merge_base import Stored


class Change(Protocol):
    """One adapter's change of one weight."""

    def delta(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """What is added to `base`, the rows from `start` on as they are in the base: same shape, new."""
        ...

    def applied(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """`base`, which may be written to, with the whole change."""
        ...


@dataclass(frozen=True)
class LowRank:
    """scaling * left @ right: of a linear layer B (rows, rank) and A (rank, width)."""

    left: torch.Tensor
    right: torch.Tensor
    scaling: float

    def delta(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return (self.left[start : start + len(base)] @ self.right).mul_(self.scaling)

    def applied(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return base.addmm_(self.left[start : start + len(base)], self.right, alpha=self.scaling)


@dataclass(frozen=True)
class Dora:
    """Each row is brought to the length that DoRA trained (arXiv:2402.09353; peft/tuners/lora/dora.py)."""

    direction: LowRank
    magnitude: torch.Tensor  # (rows, 1)

    def delta(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return self.applied(start, base.clone()).sub_(base)

    def applied(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        import torch

        changed = self.direction.applied(start, base)
        norms = torch.linalg.norm(changed, dim=1, keepdim=True)
        return changed.mul_(self.magnitude[start : start + len(base)] / norms)


@dataclass(frozen=True)
class Whole:
    """Other numbers in the place of the base's: a module that was saved whole, or a trained bias."""

    stored: Stored

    def delta(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return self.applied(start, base).sub_(base)

    def applied(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return self.stored.read(start, start + len(base))


@dataclass(frozen=True)
class Rows:
    """Other numbers for a few rows of an embedding: `rows` are their places, `values` (rows, width)."""

    rows: tuple[int, ...]
    values: torch.Tensor

    def delta(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return self.applied(start, base.clone()).sub_(base)

    def applied(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        for place, row in enumerate(self.rows):
            if start <= row < start + len(base):
                base[row - start] = self.values[place]
        return base


@dataclass(frozen=True)
class Shift:
    """What `lora_bias` adds to a bias: (rows, 1)."""

    values: torch.Tensor
    scaling: float

    def delta(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return self.values[start : start + len(base)] * self.scaling

    def applied(self, start: int, base: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return base.add_(self.delta(start, base))
