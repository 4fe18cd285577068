"""The header of a safetensors file: read strictly, and written in one canonical form.

Format: 8 bytes length (little-endian), that many bytes of JSON (name -> dtype, shape, data_offsets),
then the tensors without hole or overlap (https://github.com/huggingface/safetensors). The library
accepts a name that stands twice; we do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.spec import TensorSpec
from vllm_lora_ext.strict_json import JsonRefused, parse_object

# The library takes headers of up to 100 MB; one of 16 MiB names more than 100,000 tensors already.
MAX_HEADER_BYTES = 16 << 20
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class HeaderRefused(ValueError):
    """No whole safetensors file; `code` is the finding's code."""

    def __init__(self, code: str, rule: str) -> None:
        self.code, self.rule = code, rule
        super().__init__(rule)


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor's bytes are: `offset` counts from the first byte of the file."""

    spec: TensorSpec
    offset: int
    size: int


def tensor_size(spec: TensorSpec) -> int:
    """Bytes of a tensor; raises KeyError for a dtype that safetensors does not have."""
    return math.prod(spec.shape) * ITEM_BYTES[spec.dtype]


def read_header(file: RegularFile) -> tuple[TensorPlace, ...]:
    """Every tensor of an open file, in the order of the data.

    Raises:
        HeaderRefused: weights_corrupt, weights_duplicate_key or too_large.
    """
    if file.size < 8:
        raise _corrupt(f"has {file.size} bytes, too few for a header")
    length = int.from_bytes(file.read(8), "little")
    if length > file.size - 8:
        raise _corrupt(f"promises a header of {length} bytes and has {file.size - 8}")
    if length > MAX_HEADER_BYTES:
        raise HeaderRefused(
            "too_large", f"has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    raw = file.read(length, 8)
    if raw[:1] != b"{":
        raise _corrupt("has a header that does not begin with '{'")
    try:
        header = parse_object(raw, max_depth=0)  # whose entries are looked at one by one
    except JsonRefused as error:
        code = "weights_duplicate_key" if error.code == "duplicate_key" else "weights_corrupt"
        raise HeaderRefused(code, f"has a header that {error.rule}") from error
    _check_metadata(header.pop("__metadata__", None))
    places = [_place(name, entry, 8 + length) for name, entry in header.items()]
    places.sort(key=lambda place: (place.offset, place.size))
    _check_cover(places, 8 + length, file.size)
    return tuple(places)


def _corrupt(rule: str) -> HeaderRefused:
    return HeaderRefused("weights_corrupt", rule)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt("has metadata that is not an object of strings")


def _place(name: str, entry: Any, start: int) -> TensorPlace:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise _corrupt(f"describes {name[:80]!r} by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderRefused(
            "dtype_unsupported", f"holds {name[:80]!r} as {str(dtype)[:20]!r}, a dtype not served"
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise _corrupt(f"gives {name[:80]!r} a shape or an offset that is none")
    spec = TensorSpec(name, dtype, tuple(shape))
    first, last = offsets
    if last - first != tensor_size(spec):
        raise _corrupt(f"gives {name[:80]!r} {last - first} bytes, its shape needs {tensor_size(spec)}")
    return TensorPlace(spec, start + first, last - first)


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)


def _check_cover(places: Iterable[TensorPlace], start: int, end: int) -> None:
    position = start
    for place in places:
        if place.offset != position:
            what = "overlaps another" if place.offset < position else "leaves a hole before it"
            raise _corrupt(f"has a tensor that {what}: {place.spec.name[:80]!r}")
        position += place.size
    if position != end:
        what = "is cut short" if position > end else "has bytes behind the last tensor"
        raise _corrupt(f"{what}: {end} bytes, its header tells of {position}")


def canonical_header(tensors: Mapping[str, TensorSpec]) -> tuple[bytes, list[str]]:
    """Length and header of a file with these tensors (new name -> spec), and the names in data order.

    Large items first, then by name, as the safetensors library orders them: so every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        spec = tensors[name]
        end = position + tensor_size(spec)
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order
