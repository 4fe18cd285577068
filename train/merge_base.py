"""The base of a merge: its safetensors files, their headers, and rows of one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadBaseModel
from vllm_lora_ext.files import RegularFile, read_whole
from vllm_lora_ext.tensor_file import ITEM_BYTES, HeaderRefused, TensorPlace, read_header

if TYPE_CHECKING:
    import torch

INDEX_FILE, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_INDEX_BYTES = 64 << 20
_COPY_AGAIN = "Copy the base model again."


@dataclass(frozen=True)
class Stored:
    """One tensor where it lies: in an open file, at a place."""

    file: RegularFile
    place: TensorPlace

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.spec.shape

    @property
    def rows(self) -> int:
        """How many rows it has: the first dimension, 1 for a single number."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.place.spec.dtype]

    def read_bytes(self, start: int, stop: int) -> torch.Tensor:
        """The bytes of rows `start` to `stop`, (bytes,) of uint8."""
        import torch

        data = torch.empty((stop - start) * self.row_bytes, dtype=torch.uint8)
        if len(data):
            self.file.fill(memoryview(data.numpy()), self.place.offset + start * self.row_bytes)
        return data

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows `start` to `stop` in float32, (rows, the rest); of a bias (rows, 1)."""
        import torch

        stop = self.rows if stop is None else stop
        dtype = getattr(torch, FLOATS[self.place.spec.dtype])
        block = self.read_bytes(start, stop).view(dtype)
        return block.to(torch.float32).view(stop - start, math.prod(self.shape[1:]))


@dataclass(frozen=True)
class MergeBase:
    """`shards` are file names -> tensors in the order of the data; `index` the index, if there is one."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Mapping[str, Stored]]
    index: Mapping[str, Any] | None

    @property
    def tensors(self) -> dict[str, Stored]:
        """All tensors by name."""
        return {name: stored for shard in self.shards.values() for name, stored in shard.items()}

    def digest(self) -> str:
        """Tells this base from another, and from itself after somebody wrote to it; reads no weights."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for shard, tensors in self.shards.items():
            state = (self.folder / shard).stat()
            digest.update(repr((shard, state.st_size, state.st_mtime_ns)).encode())
            digest.update(repr([stored.place for stored in tensors.values()]).encode())
        return digest.hexdigest()


@contextmanager
def open_base(name: str) -> Iterator[MergeBase]:
    """The base with all its files open.

    Raises:
        BadBaseModel: it is quantised, has no safetensors weights, or not all that its index names.
    """
    config = read_base_model(name).config
    _refuse_quantised(name, config)
    folder = _folder_of(name)
    index = _read_index(folder / INDEX_FILE)
    wanted = _wanted(name, folder, index)
    with ExitStack() as stack:
        shards = {shard: _open(folder / shard, stack) for shard in sorted(set(wanted.values()))}
        for tensor, shard in wanted.items():
            if index is not None and tensor not in shards[shard]:
                rule = f"names {tensor!r} in {shard}, which does not hold it"
                raise BadBaseModel(str(folder / INDEX_FILE), rule, _COPY_AGAIN)
        yield MergeBase(name, folder, config, shards, index)


def _refuse_quantised(name: str, config: Mapping[str, Any]) -> None:
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if not part.get(key):
                continue
            method = part[key].get("quant_method") if isinstance(part[key], Mapping) else None
            rule = (
                f"is quantised ({method or key}): a change of an adapter's size is smaller than the steps of "
                "its weights and would be rounded away"
            )
            fix = "Merge into the unquantised model, and quantise the result."
            raise BadBaseModel(name, rule, fix)


def _folder_of(name: str) -> Path:
    """The folder of the base; a hub id is downloaded, or taken from the local cache."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's errors are many, and the network's
        rule = f"cannot be downloaded ({type(error).__name__})"
        raise BadBaseModel(name, rule, "Download the model and give its folder.") from error


def _read_index(path: Path) -> Mapping[str, Any] | None:
    if not path.exists():
        return None
    try:
        index = json.loads(read_whole(path, _MAX_INDEX_BYTES))
        shards = index["weight_map"]
        whole = bool(shards) and all(isinstance(shard, str) for shard in shards.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        rule = f"cannot be read ({type(error).__name__})"
        raise BadBaseModel(str(path), rule, _COPY_AGAIN) from error
    if not whole:
        raise BadBaseModel(str(path), "has a weight_map that is none", _COPY_AGAIN)
    outside = next((shard for shard in shards.values() if Path(shard).name != shard), None)
    if outside is not None:
        raise BadBaseModel(str(path), f"names {outside!r}, which is no file beside it", _COPY_AGAIN)
    return dict(index)


def _wanted(name: str, folder: Path, index: Mapping[str, Any] | None) -> Mapping[str, str]:
    """Tensor -> file, or any one name for a model in one file."""
    wanted: Mapping[str, str] = index["weight_map"] if index is not None else {"": SINGLE_FILE}
    missing = sorted(shard for shard in set(wanted.values()) if not (folder / shard).is_file())
    if not missing:
        return wanted
    if index is not None:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise BadBaseModel(str(folder / INDEX_FILE), f"names {shown}, not there", _COPY_AGAIN)
    fix = "Save it with save_pretrained, which writes safetensors."
    raise BadBaseModel(name, f"holds neither {SINGLE_FILE} nor {INDEX_FILE}", fix)


def _open(path: Path, stack: ExitStack) -> dict[str, Stored]:
    try:
        file = stack.enter_context(RegularFile(path))
        return {place.spec.name: Stored(file, place) for place in read_header(file)}
    except HeaderRefused as error:
        raise BadBaseModel(str(path), error.rule, _COPY_AGAIN) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadBaseModel(str(path), f"cannot be read ({reason})", _COPY_AGAIN) from error
