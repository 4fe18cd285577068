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


class Segments:
    """Segments of rows, and the same rows side by side, each segment padded to the longest: (rows, ...) and
    (segments, longest, ...), so that one batched product takes them all.

    `spans` are (first row, number of rows) of each segment, in order and none of them empty; `num_rows`
    are all rows, also those of no segment. Padding repeats the segment's own last row, so that nothing of
    one segment gets near another; `real` is (segments, longest, 1), False where a row is padding, and None
    if there is no padding.
    """

    def __init__(
        self, spans: Sequence[tuple[int, int]], num_rows: int, device: torch.device | None = None
    ) -> None:
        starts, counts = torch.tensor(spans, device=device).t()[:, :, None]
        self.shape = (len(spans), int(counts.max()))
        steps = torch.arange(self.shape[1], device=device)[None]
        is_real = steps < counts
        self.real = None if bool(is_real.all()) else is_real[:, :, None]
        covered = int(counts.sum())
        self._are_all = covered == num_rows
        self._num_rows = num_rows
        self._sources = (starts + torch.minimum(steps, counts - 1)).flatten()
        self._places = is_real.flatten().nonzero()[:, 0]
        self._rows = self._sources[self._places]

    @property
    def is_view(self) -> bool:
        """Whether `pad` is only another look at the same memory."""
        return self.real is None and self._are_all

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, ...) -> (segments, longest, ...)."""
        shape = (*self.shape, *rows.shape[1:])
        return rows.view(shape) if self.is_view else rows.index_select(0, self._sources).view(shape)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """(segments, longest, ...) -> (rows, ...), zero in rows of no segment."""
        rows = padded.flatten(0, 1)
        if self.is_view:
            return rows
        real = rows if self.real is None else rows.index_select(0, self._places)
        if self._are_all:
            return real
        return real.new_zeros(self._num_rows, *real.shape[1:]).index_copy_(0, self._rows, real)


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
