"""What an adapter changes in one module's weight, as two thin factors, and the best factors of a given rank.

Everything is computed in float64: what is exact in mathematics stays exact up to float32, in which
adapters are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """The change b @ a of one module's weight; `a` is (rank, in), `b` (out, rank), both float64."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The change's output (out, n) of `x` (in, n)."""
        return self.b @ (self.a @ x)

    def minus(self, other: Factors) -> Factors:
        """The difference, of the sum of both ranks."""
        return Factors(torch.cat([self.a, other.a]), torch.cat([self.b, -other.b], dim=1))


@dataclass(frozen=True)
class Spectrum:
    """A change as u @ diag(s) @ vh: `u` (out, k), `s` (k,) falling, `vh` (k, in), float64."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return float(self.s.norm())

    def error(self, rank: int) -> float:
        """The share of the change that the best factors of `rank` leave out (Eckart and Young 1936)."""
        return float(self.s[rank:].norm()) / self.norm if self.norm else 0.0

    def rank_for(self, error: float) -> int:
        """The smallest rank, at least 1, whose `error` is not above the given one."""
        return next((rank for rank in range(1, len(self.s)) if self.error(rank) <= error), len(self.s))

    def factors(self, rank: int) -> Factors:
        """The best factors of that rank, of like size: a server rounds each of them to its own dtype."""
        root = self.s[:rank].sqrt()
        return Factors(root[:, None] * self.vh[:rank], self.u[:, :rank] * root)


def spectrum_of(factors: Factors) -> Spectrum:
    """By QR of each factor and the SVD of a (rank, rank) core: O((in + out) rank^2), no dense matrix."""
    q_b, r_b = torch.linalg.qr(factors.b)
    q_a, r_a = torch.linalg.qr(factors.a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return Spectrum(q_b @ u, s, vh @ q_a.T)


def dense_spectrum(change: torch.Tensor) -> Spectrum:
    """Of a change (out, in) that comes as a whole matrix, by the eigenvectors of its smaller Gram matrix."""
    wide = change if change.shape[0] <= change.shape[1] else change.T
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors.flip(1)
    right = left.T @ wide  # what is projected is exact, whatever the eigenvalues were rounded to
    s = right.norm(dim=1)
    order = s.argsort(descending=True)
    left, right, s = left[:, order], right[order], s[order]
    vh = right / s.clamp_min(torch.finfo(s.dtype).tiny)[:, None]
    return Spectrum(left, s, vh) if wide is change else Spectrum(vh.T, s, left.T)
