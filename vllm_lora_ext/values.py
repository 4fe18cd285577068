"""The numbers in an adapter's weights: are they numbers, how large are they, do they change anything?

One pass over the file in pieces. A float's bits without the sign are ordered like its size, so the
largest of them tells both: infinities and NaN lie above every finite number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.peft_format import TENSOR_NAME
from vllm_lora_ext.spec import AdapterSpec, Finding, Severity
from vllm_lora_ext.tensor_file import TensorPlace

PIECE_BYTES = 1 << 20
LARGEST = 65504.0  # of float16, in which an engine may compute

_BITS: dict[str, Any] = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def read_values(
    file: RegularFile, places: Sequence[TensorPlace], sink: Callable[[memoryview], object] | None = None
) -> dict[str, float]:
    """The largest absolute value of each tensor, inf where one is no number; `sink` gets every piece.

    Raises:
        ValueError: the file became shorter.
    """
    buffer = np.empty(PIECE_BYTES, np.uint8)
    peaks = {}
    for place in places:
        bits = _BITS[place.spec.dtype]
        mask, peak = bits(np.iinfo(bits).max >> 1), bits(0)
        for start in range(0, place.size, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, place.size - start)]
            file.fill(piece.data, place.offset + start)
            peak = max(peak, (piece.view(bits) & mask).max())
            if sink is not None:
                sink(piece.data)
        peaks[place.spec.name] = _as_float(peak, place.spec.dtype)
    return peaks


def _as_float(bits: Any, dtype: str) -> float:
    if dtype == "BF16":  # the upper half of a float32
        value = float(np.array([int(bits) << 16], np.uint32).view(np.float32)[0])
    else:
        value = float(np.array([bits]).view(_FLOATS[dtype])[0])
    return value if value == value else float("inf")


def judge_values(spec: AdapterSpec, peaks: Mapping[str, float]) -> list[Finding]:
    """What the largest values say: no number, too large for the engine, or no effect at all."""
    findings = []
    for name, peak in sorted(peaks.items()):
        if peak == float("inf"):
            rule, fix = "holds NaN or infinity", "Train it again, with a smaller learning rate."
            findings.append(Finding("weights_not_finite", name[:120], rule, fix))
        elif peak > LARGEST:
            rule = f"holds {peak:.3g}; more than {LARGEST:.0f} overflows in the engine"
            findings.append(Finding("weights_out_of_range", name[:120], rule, "Train it again."))
    sides: dict[str, list[float]] = {}
    for name, peak in peaks.items():
        if match := TENSOR_NAME.fullmatch(name):
            sides.setdefault(match["module"], []).append(peak)
            scaling = spec.scaling_of(match["module"])
            if peak <= LARGEST < peak * scaling:
                rule = f"times its scaling {scaling:.3g} is {peak * scaling:.3g}, which overflows"
                findings.append(Finding("weights_out_of_range", name[:120], rule, "Check lora_alpha."))
    if sides and all(min(peaks_of_module) == 0 for peaks_of_module in sides.values()):
        rule = "every lora_B (or lora_A) is zero, so it answers like the base model"
        findings.append(
            Finding(
                "adapter_no_effect", spec.name, rule, "Train it longer, or with gradients.", Severity.WARNING
            )
        )
    return findings
