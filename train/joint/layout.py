"""Which tokens of a shared pass are whose, and how attention finds its rows among them.

In training, rows lie behind each other without any padding, (1, all tokens): what works token by token (the
base's matrices, norms) does no work for nothing, and attention puts each row in a place of its own for a
moment. In generation there are rows of one width, (rows, width), with a mask, as transformers makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from train.attention import attend
from vllm_lora_ext.grouped import Segments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "vllm_lora_joint"
_current: list[Layout] = []  # of the pass that is under way; there is one at a time


class Layout:
    """`rows` are how many rows of the pass each identity has, in order; `lengths` the tokens of each row
    where they lie behind each other, None where all have one width. `seeds` are those of dropout."""

    def __init__(
        self,
        rows: Mapping[str, int],
        lengths: Sequence[int] | None,
        seeds: Mapping[str, int] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.names = tuple(rows)
        self.lengths = lengths
        self._device = device
        self._starts = [0, *accumulate([1] * sum(rows.values()) if lengths is None else lengths)]
        bounds = [0, *accumulate(rows.values())]
        self._bounds = {name: bounds[number : number + 2] for number, name in enumerate(rows)}
        self._seeds = dict(seeds or {})
        self._made: dict[tuple[tuple[str, ...], int], Segments] = {}

    def segments(self, names: Sequence[str], num_tokens: int) -> Segments:
        """The tokens of these identities, which are of this pass, among `num_tokens` of all."""
        key = (tuple(names), num_tokens)
        if key not in self._made:
            spans = [self._span(name, num_tokens) for name in names]
            self._made[key] = Segments(spans, num_tokens, self._device)
        return self._made[key]

    def _span(self, name: str, num_tokens: int) -> tuple[int, int]:
        """First token, and number of tokens."""
        width = num_tokens // self._starts[-1]  # of a row in generation, else 1
        first, end = (self._starts[bound] * width for bound in self._bounds[name])
        return first, end - first

    def kept(self, dropouts: Mapping[str, float], module: int, rows: torch.Tensor) -> torch.Tensor | None:
        """What dropout multiplies `rows` (all tokens, width) by, drawn for each identity by itself; None if
        nothing is dropped, which is so without a seed.

        Drawn anew in front of the same module it is the same, as gradient checkpointing needs it.
        """
        drawn = {name: share for name, share in dropouts.items() if share and name in self._seeds}
        if not drawn:
            return None
        kept = torch.ones_like(rows)
        for name, share in drawn.items():
            first, count = self._span(name, len(rows))
            part = kept[first : first + count]
            chance = torch.Generator(rows.device).manual_seed(self._seeds[name] + module)
            part.bernoulli_(1 - share, generator=chance).div_(1 - share)
        return kept

    @cached_property
    def sequences(self) -> Segments:
        """The rows themselves, for attention."""
        assert self.lengths is not None
        spans = list(zip(self._starts, self.lengths, strict=False))
        return Segments(spans, self._starts[-1], self._device)


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Inside, the pass that is computed has this layout; backward passes belong inside too."""
    _current.append(layout)
    try:
        yield
    finally:
        _current.pop()


def current() -> Layout:
    """The layout of the pass that is under way."""
    return _current[-1]


def use_layout_attention(model: PreTrainedModel) -> None:
    """Let `model`, on torch's attention, find its rows by the current layout."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def mask(*args: Any, **options: Any) -> torch.Tensor | None:
        made: torch.Tensor | None = None if current().lengths is not None else sdpa_mask(*args, **options)
        return made

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, mask)
    model.set_attn_implementation(_NAME)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As `train.attention.attend`; of a pass whose rows lie behind each other, query, key and value are
    (1, heads, all tokens, size), and so is what comes of them (1, all tokens, heads, size)."""
    layout = current()
    if layout.lengths is None:
        return attend(module, query, key, value, attention_mask, **options)
    rows = (_Pad.apply(part[0].transpose(0, 1), layout.sequences) for part in (query, key, value))
    by_heads = [part.transpose(1, 2) for part in rows]
    out, _ = attend(module, by_heads[0], by_heads[1], by_heads[2], None, **options)
    return _Unpad.apply(out, layout.sequences)[None], None


class _Pad(torch.autograd.Function):  # type: ignore[misc]
    """Rows in a place of their own. Nothing looks at the padding, so its gradient is zero and left out."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, rows: Segments) -> torch.Tensor:
        ctx.rows = rows
        return rows.pad(tokens.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.rows.unpad(grads[0].contiguous()), None


class _Unpad(torch.autograd.Function):  # type: ignore[misc]
    """The other way."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, rows: Segments) -> torch.Tensor:
        ctx.rows = rows
        return rows.unpad(padded)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        padded = ctx.rows.pad(grads[0].contiguous())
        real = ctx.rows.real
        return (padded if real is None else padded * real[..., None]), None
