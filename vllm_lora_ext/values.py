"""The numbers in an adapter's weights: are they numbers, how large are they, do they change anything?

One pass over the file in pieces. A float's bits without the sign are ordered like its size, so the
largest of them tells both: infinities and NaN lie above every finite number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

    The pieces come in the order of `places`, and several small tensors that lie together make one.

    Raises:
        ValueError: the file became shorter.
    """
    buffer = np.empty(PIECE_BYTES, np.uint8)
    peaks: dict[str, Any] = {}
    for run in _runs(places):
        start, end = run[0].offset, run[-1].offset + run[-1].size
        offsets = np.array([place.offset for place in run])
        for first in range(start, end, PIECE_BYTES):
            piece = buffer[: min(PIECE_BYTES, end - first)]
            file.fill(piece.data, first)
            _raise_peaks(peaks, run, offsets, piece, first)
            if sink is not None:
                sink(piece.data)
    return {place.spec.name: _as_float(peaks.get(place.spec.name, 0), place.spec.dtype) for place in places}


def _runs(places: Sequence[TensorPlace]) -> Iterator[list[TensorPlace]]:
    """Tensors of one dtype that lie one behind the other, as one."""
    run: list[TensorPlace] = []
    for place in places:
        if not place.size:
            continue
        follows = run and run[-1].offset + run[-1].size == place.offset
        if run and not (follows and run[-1].spec.dtype == place.spec.dtype):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _raise_peaks(
    peaks: dict[str, Any], run: Sequence[TensorPlace], offsets: np.ndarray, piece: np.ndarray, first: int
) -> None:
    """Take the largest bits of each tensor that has a part in this piece, which begins at `first`."""
    bits = _BITS[run[0].spec.dtype]
    values = piece.view(bits) & bits(np.iinfo(bits).max >> 1)
    begin = int(np.searchsorted(offsets, first, "right")) - 1
    end = int(np.searchsorted(offsets, first + len(piece), "left"))
    cuts = np.maximum(offsets[begin:end] - first, 0) // values.itemsize
    for place, peak in zip(run[begin:end], np.maximum.reduceat(values, cuts), strict=True):
        peaks[place.spec.name] = max(peaks.get(place.spec.name, peak), peak)


def floats_of(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Stored numbers as numpy's floats, in the same shape; `stored` are their bytes or their bits.

    numpy has no BF16, which is the upper half of a float32. Raises KeyError for a dtype that is no float.
    """
    bits = stored.view(_BITS[dtype])
    if dtype == "BF16":
        bits = bits.astype(np.uint32) << 16
    floats: np.ndarray = bits.view(_FLOATS.get(dtype, np.float32))
    return floats


def _as_float(bits: Any, dtype: str) -> float:
    value = float(floats_of(np.array([bits], _BITS[dtype]), dtype)[0])
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
