"""Reads an adapter's files into memory that belongs to us.

Mapped files are not enough: cut one short, and the process that looks at it dies
of a signal that Python cannot catch (SIGBUS). So everything is read with `read`,
into tensors of our own, and a file that changes meanwhile is an error or old
content, never a crash.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.peft_format import CONFIG_FILE, WEIGHTS_FILE, judge_patterns

CHUNK_BYTES = 1 << 20
_MAX_CONFIG_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_chunk(file: int, target: memoryview) -> int:
    """Read from where the file descriptor stands into `target`; how many bytes. All reading passes here."""
    return os.readv(file, [target])


class RegularFile:
    """An open regular file. A pipe or a device is refused, and opening one does not wait for its other end.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        state = os.fstat(self._file)
        if not stat.S_ISREG(state.st_mode):
            os.close(self._file)
            raise ValueError(f"{self.name} is no regular file")
        self.size = state.st_size

    def __enter__(self) -> RegularFile:
        return self

    def __exit__(self, *reason: object) -> None:
        os.close(self._file)

    def fill(self, target: memoryview, offset: int) -> None:
        """Fill `target` from `offset` on.

        Raises:
            ValueError: the file ends before.
        """
        os.lseek(self._file, offset, os.SEEK_SET)
        filled = 0
        while filled < len(target):
            count = read_chunk(self._file, target[filled : filled + CHUNK_BYTES])
            if not count:
                raise ValueError(f"{self.name} ends after {offset + filled} bytes, more were promised")
            filled += count

    def read(self, size: int, offset: int = 0) -> bytes:
        """`size` bytes from `offset` on; raises as `fill`."""
        data = bytearray(size)
        self.fill(memoryview(data), offset)
        return bytes(data)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config, an object whose patterns are plain names.

    Raises:
        OSError, ValueError: it is not there, no JSON object, or a pattern is more than names (a
            regular expression can run for ever).
    """
    with RegularFile(folder / CONFIG_FILE) as file:
        if file.size > _MAX_CONFIG_BYTES:
            raise ValueError(f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes")
        try:
            config = json.loads(file.read(file.size))
        except RecursionError as error:
            raise ValueError(f"{CONFIG_FILE} is nested too deeply") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_FILE} holds a {type(config).__name__}, not an object")
    if findings := judge_patterns(config):
        raise ValueError("; ".join(map(str, findings)))
    return config


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the weights file by name, in memory of their own.

    Raises:
        OSError, ValueError: the file is not there, or is no whole safetensors file.
    """
    with RegularFile(folder / WEIGHTS_FILE) as file:
        header, start = _read_header(file)
        tensors = {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            first, last = entry["data_offsets"]
            tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            if last > first:
                target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                file.fill(target, start + first)
            tensors[name] = tensor
    return tensors


def _read_header(file: RegularFile) -> tuple[dict[str, Any], int]:
    """The checked entries of the header, and where the data begin."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_HEADER_BYTES, file.size - 8):
        raise ValueError(f"{file.name}: its header is said to be {length} bytes long")
    try:
        header = json.loads(file.read(length, 8))
    except RecursionError as error:
        raise ValueError(f"{file.name}: its header is nested too deeply") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file.name}: its header is no object")
    header.pop("__metadata__", None)
    start = 8 + length
    for name, entry in header.items():
        if not _is_whole(entry, file.size - start):
            raise ValueError(f"{file.name}: tensor {name} does not fit the file")
    return header, start


def _is_whole(entry: Any, available: int) -> bool:
    """Whether an entry's dtype, shape and place agree and lie within the data."""
    try:
        (first, last), shape, dtype = entry["data_offsets"], entry["shape"], _DTYPES[entry["dtype"]]
        if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
            return False
        return bool(last <= available and last - first == math.prod(shape) * dtype.itemsize)
    except (KeyError, TypeError, ValueError):
        return False
