"""The header of a safetensors file: read strictly, and written in one canonical form.

Format: 8 bytes length (little-endian), that many bytes of JSON (name -> dtype, shape, data_offsets),
then the tensors without hole or overlap (https://github.com/huggingface/safetensors). The library
accepts a name that stands twice; we do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any, NamedTuple

from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.spec import TensorSpec
from vllm_lora_ext.strict_json import JsonRefused, Pairs, parse_object, without_duplicates

# The library takes headers of up to 100 MB. A mixture of 48 layers with 128 experts has 37,000 tensors in
# 5 MB, which take a second to go through; the largest that are known have 90,000.
MAX_HEADER_BYTES, MAX_TENSORS = 16 << 20, 100_000
MAX_NAME, _MAX_PARTS = 512, 32  # honest names have 80 characters and 13 parts
_MAX_DOTS = 16 * MAX_TENSORS  # in all names together
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

_KEYS = ("dtype", "shape", "data_offsets")  # in the order that the library writes
_TOO_LARGE = 1 << 63


class HeaderRefused(ValueError):
    """No whole safetensors file; `code` is the finding's code."""

    def __init__(self, code: str, rule: str) -> None:
        self.code, self.rule = code, rule
        super().__init__(rule)


class TensorPlace(NamedTuple):
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
    _check_amount(raw)
    try:
        header = parse_object(raw, max_depth=0, make=_entry)  # whose entries are looked at one by one
    except JsonRefused as error:
        code = "weights_duplicate_key" if error.code == "duplicate_key" else "weights_corrupt"
        raise HeaderRefused(code, f"has a header that {error.rule}") from error
    _check_metadata(header.pop("__metadata__", None))
    places = [_place(name, entry, 8 + length) for name, entry in header.items()]
    places.sort(key=attrgetter("offset", "size"))
    _check_cover(places, 8 + length, file.size)
    return tuple(places)


def _corrupt(rule: str) -> HeaderRefused:
    return HeaderRefused("weights_corrupt", rule)


def _check_amount(raw: bytes) -> None:
    """Count before parsing, which is where the time goes; a tensor of eight dimensions has 11 commas."""
    entries = raw.count(b'"data_offsets"')
    if entries > MAX_TENSORS:
        raise HeaderRefused("too_large", f"names {entries} tensors, at most {MAX_TENSORS} are taken")
    brackets, commas = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if brackets > 4 * MAX_TENSORS or commas > 12 * MAX_TENSORS:
        raise HeaderRefused("too_large", f"has a header of {brackets} brackets and {commas} commas, too many")
    if (dots := raw.count(b".")) > _MAX_DOTS:
        raise HeaderRefused("too_large", f"has {dots} dots in its names, at most {_MAX_DOTS} are taken")


def _entry(pairs: Pairs) -> Any:
    """An object inside a header: what describes a tensor as its three values, for they are many."""
    if len(pairs) == 3:
        (first, dtype), (second, shape), (third, offsets) = pairs
        are_lists = type(shape) is list and type(offsets) is list
        if are_lists and first == "dtype" and second == "shape" and third == "data_offsets":
            # Tuples of numbers are nothing that the garbage collector has to look at again and again.
            return dtype, tuple(shape), tuple(offsets)
    return without_duplicates(pairs)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt("has metadata that is not an object of strings")


def _place(name: str, entry: Any, start: int) -> TensorPlace:
    if isinstance(entry, dict):  # in another order
        entry = _entry([(key, entry[key]) for key in _KEYS if key in entry and len(entry) == 3])
    if type(entry) is not tuple:
        raise _corrupt(f"describes {name[:80]!r} by something else than dtype, shape and data_offsets")
    if len(name) > MAX_NAME or name.count(".") >= _MAX_PARTS:
        rule = f"names a tensor {name[:80]!r}..., at most {MAX_NAME} characters in {_MAX_PARTS} parts"
        raise _corrupt(f"{rule} are taken")
    dtype, shape, offsets = entry
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise HeaderRefused(
            "dtype_unsupported", f"holds {name[:80]!r} as {str(dtype)[:20]!r}, a dtype not served"
        )
    if not _are_sizes(shape, 8) or not _are_sizes(offsets, 2) or len(offsets) != 2:
        raise _corrupt(f"gives {name[:80]!r} a shape or an offset that is none")
    first, last = offsets
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if last - first != size:
        raise _corrupt(f"gives {name[:80]!r} {last - first} bytes, its shape needs {size}")
    return TensorPlace(TensorSpec(name, dtype, shape), start + first, size)


def _are_sizes(numbers: tuple[Any, ...], most: int) -> bool:
    # A list takes a third of a generator's time.
    return len(numbers) <= most and not [n for n in numbers if type(n) is not int or not 0 <= n < _TOO_LARGE]


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
