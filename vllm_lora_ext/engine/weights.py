"""Reads an adapter's files into memory that belongs to us, and compares them with the version's digest.

Mapped files are not enough: cut one short, and the process that looks at it dies of a signal that
Python cannot catch (SIGBUS). So everything is read with `read`, into tensors of our own, and a file
that changes meanwhile is an error, never a crash and never served.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from vllm_lora_ext.errors import VersionDamaged
from vllm_lora_ext.files import RegularFile, read_whole
from vllm_lora_ext.peft_config import judge_patterns
from vllm_lora_ext.peft_format import CONFIG_FILE, MAX_CONFIG_BYTES, WEIGHTS_FILE
from vllm_lora_ext.store import is_version_folder, open_version
from vllm_lora_ext.strict_json import parse_object
from vllm_lora_ext.tensor_file import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def read_adapter_files(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config of an adapter, and its tensors by name in memory of their own.

    A folder of the store has to be what its name says, byte for byte.

    Raises:
        OSError, ValueError: a file is not there, or is not what it should be.
        VersionDamaged: the store's files are not as they were written.
    """
    if not is_version_folder(folder):
        return read_config(folder), read_tensors(folder)
    version = open_version(folder)
    config = read_config(folder, version.files.get(CONFIG_FILE))
    return config, read_tensors(folder, version.files.get(WEIGHTS_FILE))


def read_config(folder: Path, sha256: str | None = None) -> dict[str, Any]:
    """The adapter's config, an object whose patterns are plain names.

    Raises:
        OSError, ValueError: it is not there, no JSON object, or a pattern is more than names (a
            regular expression can run for ever).
        VersionDamaged: its digest is not `sha256`.
    """
    data = read_whole(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    _compare(folder, CONFIG_FILE, hashlib.sha256(data).hexdigest(), sha256)
    try:
        config = parse_object(data)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE} {error}") from error
    if findings := judge_patterns(config):
        raise ValueError("; ".join(map(str, findings)))
    return config


def read_tensors(folder: Path, sha256: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of the weights file by name, in memory of their own.

    Raises:
        OSError, ValueError: the file is not there, or is no whole safetensors file.
        VersionDamaged: its digest is not `sha256`.
    """
    with RegularFile(folder / WEIGHTS_FILE) as file:
        try:
            places = read_header(file)
        except ValueError as error:
            if sha256 is None:
                raise ValueError(f"{WEIGHTS_FILE} {error}") from error
            raise VersionDamaged(folder.name[:12], f"{WEIGHTS_FILE} {error}") from error
        digest = hashlib.sha256(file.read(places[0].offset if places else file.size))
        tensors = {}
        for place in places:  # in the order of the file, without a hole
            if place.spec.dtype not in _DTYPES:
                raise ValueError(f"{WEIGHTS_FILE} holds {place.spec.dtype} tensors, which cannot be served")
            tensor = torch.empty(place.spec.shape, dtype=_DTYPES[place.spec.dtype])
            if place.size:
                target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
                file.fill(target, place.offset)
                if sha256 is not None:
                    digest.update(target)
            tensors[place.spec.name] = tensor
    _compare(folder, WEIGHTS_FILE, digest.hexdigest(), sha256)
    return tensors


def _compare(folder: Path, name: str, found: str, expected: str | None) -> None:
    if expected is not None and found != expected:
        raise VersionDamaged(folder.name[:12], f"{name} is not as it was written")
