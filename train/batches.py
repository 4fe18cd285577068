"""Examples become batches: rows of like length together, right-padded, in an order that the seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from train.prompts import IGNORED, Example

_WINDOW = 16  # batches whose rows are sorted by length among themselves: enough for little padding


class LengthBuckets(torch.utils.data.Sampler[int]):  # type: ignore[misc]
    """Row numbers for an epoch, such that every `batch_size` of them in turn are of like length.

    The order is a function of seed and epoch alone, so that a resumed run sees what an unbroken one saw.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        chance = random.Random(f"{self._seed} {self._epoch}")
        order = list(range(len(self._lengths)))
        chance.shuffle(order)
        size, window = self._batch_size, self._batch_size * _WINDOW
        whole = len(order) // size * size
        order, rest = order[:whole], order[whole:]  # the smaller last batch stays the last one
        batches = []
        for start in range(0, whole, window):
            alike = sorted(order[start : start + window], key=lambda row: self._lengths[row])
            batches += [alike[at : at + size] for at in range(0, len(alike), size)]
        chance.shuffle(batches)
        yield from (row for batch in [*batches, rest] for row in batch)


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors `input_ids` and `labels`, each (rows, longest).

    There is no attention mask: padding stands behind its row, where causal attention never looks, and
    carries no loss. Without a mask, attention takes its fastest way.
    """
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.input_ids)] = torch.tensor(example.labels)
    return {"input_ids": ids, "labels": labels}
