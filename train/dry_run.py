"""A run that is only looked at: what would be trained on, for how many steps, and what it would take."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.config import TrainConfig, planned_steps
from train.estimate import estimate, model_size
from train.prepare import Prepared

if TYPE_CHECKING:
    import torch

_BINS = 10
_BAR = 40  # characters of the longest bar


def dry_run(prepared: Prepared, config: TrainConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that can be said before the first step, as JSON has it; `dtype` is the base's in training.

    Takes about a second and a half, to measure the machine.

    Raises:
        BadBaseModel: transformers cannot build the base from its config.
    """
    training = prepared.training
    lengths = [len(example.input_ids) for example in training]
    trained = sum(example.trained_tokens for example in training)
    found = estimate(training, model_size(config), config, dtype)
    return {
        "rows": {
            "training": prepared.training_rows,
            "held_out": prepared.held_out_rows,
            "bad": len(prepared.bad),
            "too_long": len(prepared.too_long),
            "truncated": 0,  # a row is left out whole
        },
        "examples_per_epoch": len(training),
        "tokens": {"per_epoch": sum(lengths), "trained": trained, "longest": max(lengths)},
        "lengths": histogram(lengths),
        "steps": planned_steps(len(training), config),
        "findings": [finding.as_dict() for finding in prepared.findings],
        "estimate": {**dataclasses.asdict(found), "memory_bytes": found.memory_bytes},
    }


def histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(shortest, longest, how many) of at most ten bins of one width, from the shortest length on."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = -(-(high - low + 1) // _BINS)
    counts = Counter((length - low) // width for length in lengths)
    return [(low + i * width, low + (i + 1) * width - 1, counts[i]) for i in range((high - low) // width + 1)]


def as_text(report: dict[str, Any], config: TrainConfig) -> str:
    """The report as a person reads it; findings are not in it, they go to stderr."""
    rows, tokens = report["rows"], report["tokens"]
    share = tokens["trained"] / tokens["per_epoch"]
    return "\n".join(
        [
            f"{rows['training']} rows to train on, {rows['held_out']} held out; {rows['bad']} could not be "
            f"read, {rows['too_long']} are longer than --max-length {config.max_length}, none is cut short",
            f"{report['examples_per_epoch']} examples per epoch, {tokens['per_epoch']:,} tokens, "
            f"{share:.1%} of them trained, at most {tokens['longest']} in a row",
            "",
            *_bars(report["lengths"]),
            "",
            f"{report['steps']:,} steps",
            *_estimate_lines(report["estimate"]),
        ]
    )


def _bars(lengths: Sequence[tuple[int, int, int]]) -> list[str]:
    most = max((count for _, _, count in lengths), default=1)
    wide = len(str(lengths[-1][1])) if lengths else 1
    return [
        f"{low:>{wide}} to {high:>{wide}} tokens {'#' * -(-_BAR * count // most):<{_BAR}} {count}"
        for low, high, count in lengths
    ]


def _estimate_lines(found: dict[str, Any]) -> list[str]:
    parts = ("weights_bytes", "trained_bytes", "activation_bytes")
    weights, trained, activations = (_size(found[part]) for part in parts)
    return [
        f"estimate: {_size(found['memory_bytes'])} of memory: {weights} frozen weights, {trained} of what is "
        f"trained with its optimizer, {activations} activations",
        f"estimate: {_time(found['seconds'])} at {found['flops_per_second'] / 1e9:,.0f} GFLOP/s, "
        f"measured on this machine now",
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
