"""LoRA for rows of different adapters, in torch alone: rows are grouped, products are per group.

Rows are taken in tiles of one fixed size, so that every product of a module has
the same shapes whatever the batch holds: torch picks its kernels by shape, and a
row's numbers must not depend on how many neighbours share its adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

TILE_ROWS = 16


@dataclass(frozen=True)
class LoraPair:
    """One adapter's weights for one slice of a module, scaling merged into B.

    `a` is (rank, in_features), `b_t` is B transposed, (rank, width); the slice is the
    `width` output features from `offset` on.
    """

    a: torch.Tensor
    b_t: torch.Tensor
    offset: int


def tiles(rows: np.ndarray) -> Iterator[torch.Tensor]:
    """`rows` (n,) cut into pieces of at most `TILE_ROWS`, as index tensors."""
    for start in range(0, len(rows), TILE_ROWS):
        yield torch.from_numpy(rows[start : start + TILE_ROWS].astype(np.int64))


def add_lora(y: torch.Tensor, x: torch.Tensor, rows: np.ndarray, pairs: Sequence[LoraPair]) -> None:
    """y[rows] += B(A x[rows]) for one adapter; all other rows keep their bits.

    `y` is (tokens, out_features), changed in place; `x` is (tokens, in_features).
    """
    for index in tiles(rows):
        padded = x.new_zeros(TILE_ROWS, x.shape[1])
        padded[: len(index)] = x[index]
        for pair in pairs:
            low_rank = padded.to(pair.a.dtype) @ pair.a.t()
            _add(y, index, low_rank, pair)


def add_embedding(y: torch.Tensor, tokens: torch.Tensor, rows: np.ndarray, pair: LoraPair) -> None:
    """y[rows] += B(A[:, tokens[rows]]): an embedding's low-rank numbers are columns of A.

    `y` is (tokens, hidden), changed in place; `tokens` is (tokens,), integer.
    """
    for index in tiles(rows):
        low_rank = pair.a.new_zeros(TILE_ROWS, pair.a.shape[0])
        low_rank[: len(index)] = pair.a[:, tokens[index]].t()
        _add(y, index, low_rank, pair)


def _add(y: torch.Tensor, index: torch.Tensor, low_rank: torch.Tensor, pair: LoraPair) -> None:
    update = (low_rank @ pair.b_t)[: len(index)]
    columns = slice(pair.offset, pair.offset + pair.b_t.shape[1])
    y[index, columns] = (y[index, columns].float() + update.float()).to(y.dtype)
