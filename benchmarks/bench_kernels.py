"""Which form of the CPU LoRA step is fastest: all modules of one model step, without the model around it.

Forms: `stock`, vLLM's own operators (which gather weights per token); `dense`, one product over all
active slots with a mask; `grouped`, torch products per adapter (what runs without a compiler);
`native`, C++. Interleaved, medians; one JSON line last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.report import tell
from serve.machine import describe_machine
from vllm_lora_ext.engine import native, slots
from vllm_lora_ext.engine.slots import LoraModule, Step

# Qwen2-0.5B: (in_features, widths of the slices) of the four modules of a layer
MODULES = ((896, (896, 128, 128)), (896, (896,)), (896, (4864, 4864)), (4864, (896,)))
LAYERS = 24
BATCHES = (
    *(
        (rows, adapters, 8)
        for rows in (1, 2, 8, 16, 32)
        for adapters in (1, 2, 8, 16, 32)
        if adapters <= rows
    ),
    *((16, 8, 64), (2048, 8, 8), (2048, 8, 64)),
)
Run = Callable[[], None]


class Case:
    """One batch shape on one set of modules with random weights."""

    def __init__(self, rows: int, adapters: int, rank: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.adapters, self.rank = adapters, rank
        of_row = np.sort(np.arange(rows) % adapters)
        self.slots = torch.from_numpy(of_row.astype(np.int64))
        self.step = Step(rows)
        self.step.group(of_row)
        self.modules = [
            self._module(features, widths, dtype) for _ in range(LAYERS) for features, widths in MODULES
        ]
        self.x = {features: torch.randn(rows, features).to(dtype) for features in (896, 4864)}
        self.y = {width: torch.randn(rows, width).to(dtype) for width in (1152, 896, 9728)}
        self._stacked: list[list[tuple[torch.Tensor, torch.Tensor]]] | None = None

    def _module(self, features: int, widths: Sequence[int], dtype: torch.dtype) -> LoraModule:
        module = LoraModule("module", features, widths, self.adapters, self.rank, dtype)
        for slot in range(self.adapters):
            for index, width in enumerate(widths):
                module.put_a(slot, index, (torch.randn(self.rank, features) * 0.02).to(dtype))
                module.put_b(slot, index, (torch.randn(width, self.rank) * 0.02).to(dtype))
        return module

    def stacked(self) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Per module and slice A (slots, 1, rank, in) and B (slots, 1, width, rank), as vLLM keeps them."""
        if self._stacked is None:
            self._stacked = []
            for module in self.modules:
                pairs = [module.pairs(slot) for slot in range(self.adapters)]
                self._stacked.append(
                    [
                        (
                            torch.stack([pair.a for pair in of_slice]).unsqueeze(1),
                            torch.stack([pair.b_t.t() for pair in of_slice]).unsqueeze(1).contiguous(),
                        )
                        for of_slice in zip(*pairs, strict=True)
                    ]
                )
        return self._stacked

    def ends(self, module: LoraModule) -> tuple[torch.Tensor, torch.Tensor]:
        return self.y[sum(module.widths)], self.x[module.in_features]


def by_ours(case: Case) -> None:
    """The modules' own step: native, or torch where `native.kernels` says so."""
    for module in case.modules:
        module.add_lora(case.step, *case.ends(module))


def by_torch(case: Case) -> None:
    """Products per adapter."""
    library, slots.native.kernels = slots.native.kernels, lambda: None
    try:
        by_ours(case)
    finally:
        slots.native.kernels = library


def by_stock(case: Case) -> None:
    """vLLM's bgmv operators, slice by slice."""
    from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

    for module, stacked in zip(case.modules, case.stacked(), strict=True):
        y, x = case.ends(module)
        offset = 0
        for a, b in stacked:
            buffer = torch.zeros(x.shape[0], case.rank)
            bgmv_shrink(x, a, buffer, case.slots, 1.0)
            bgmv_expand_slice(buffer, b, y, case.slots, offset, b.shape[2], True)
            offset += b.shape[2]


def by_dense(case: Case) -> None:
    """All slots for all rows, and a mask: fewest calls, most arithmetic. Wrong beside a slot with NaN."""
    mask = torch.nn.functional.one_hot(case.slots, case.adapters).repeat_interleave(case.rank, 1)
    for module, stacked in zip(case.modules, case.stacked(), strict=True):
        y, x = case.ends(module)
        offset = 0
        for a, b in stacked:
            low_rank = (x @ a.flatten(0, 2).t()) * mask.to(x.dtype)
            y[:, offset : offset + b.shape[2]] += low_rank @ b.squeeze(1).transpose(1, 2).flatten(0, 1)
            offset += b.shape[2]


FORMS: dict[str, Callable[[Case], None]] = {
    "stock": by_stock,
    "dense": by_dense,
    "grouped": by_torch,
    "native": by_ours,
}


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each form, interleaved, after one run of each to warm up."""
    # vLLM's operators and the dense product take minutes, and their weights many times over, in prefill.
    forms = FORMS if len(case.slots) <= 64 else {name: FORMS[name] for name in ("grouped", "native")}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            started = time.perf_counter()
            form(case)
            if turn:
                seconds[name].append(1e3 * (time.perf_counter() - started))
    return seconds


def main(argv: Sequence[str]) -> None:
    """Print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json-out", type=Path)
    args = parser.parse_args(argv)
    assert native.kernels() is not None, "no native kernels: see the line above"
    table = Table(title=f"LoRA step of one model step, ms, {args.dtype}")
    for column in ("rows", "adapters", "rank", *FORMS):
        table.add_column(column, justify="right")
    cells: list[dict[str, Any]] = []
    for rows, adapters, rank in BATCHES:
        taken = measure(Case(rows, adapters, rank, getattr(torch, args.dtype)), args.rounds)
        medians = {name: round(statistics.median(values), 3) for name, values in taken.items()}
        cells.append({"rows": rows, "adapters": adapters, "rank": rank, "median_ms": medians})
        table.add_row(
            str(rows),
            str(adapters),
            str(rank),
            *(f"{medians[name]:.2f}" if name in medians else "" for name in FORMS),
        )
    Console(stderr=True).print(table)
    report = {
        "benchmark": "kernels",
        "settings": {**describe_machine(), "rounds": args.rounds, "dtype": args.dtype},
        "threads": torch.get_num_threads(),
        "cells": cells,
    }
    tell(report, args.json_out)


if __name__ == "__main__":
    main(sys.argv[1:])
