"""Merged shards are written one after another, a few rows at a time, and a merge that was killed goes on.

The hidden folder beside the output says in a marker what it belongs to, and which shards in it are complete:
those are on the disk. It gets the output's name when all is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from train.merge_combine import Combined, Recipe, blocks
from train.merge_plan import MergePlan, Target
from vllm_lora_ext.errors import BadInput, OutputExists
from vllm_lora_ext.files import lock_file, sync_folder
from vllm_lora_ext.tensor_file import canonical_header

if TYPE_CHECKING:
    import torch

MARKER, _LOCK = ".merge.json", ".merge.lock"
_MOST_THREADS = 4  # blocks are small, and memory is what is waited for
_AHEAD = 2  # blocks that wait to be written while the next one is computed

Told = Callable[[int], object]  # how many bytes are done


class PartialMerge:
    """The hidden folder: which shards are in it, and for what."""

    def __init__(self, folder: Path, belongs_to: str) -> None:
        self.folder, self._belongs_to = folder, belongs_to
        self.digests: dict[str, str] = {}

    def resume(self) -> bool:
        """Whether there are shards of this very merge. Those of another one are removed."""
        try:
            marker = json.loads((self.folder / MARKER).read_text(encoding="utf-8"))
            known = marker["shards"] if marker["belongs_to"] == self._belongs_to else None
        except (OSError, ValueError, KeyError, TypeError):
            known = None
        kept = dict(known) if isinstance(known, dict) else {}
        for path in self.folder.iterdir():
            if path.name not in (*kept, MARKER, _LOCK):
                path.unlink()
        self.digests = {name: digest for name, digest in kept.items() if (self.folder / name).is_file()}
        self._write_marker()
        return bool(self.digests)

    def complete(self, shard: str, digest: str) -> None:
        """The shard is on the disk; so is, after this, that it is."""
        self.digests[shard] = digest
        self._write_marker()

    def _write_marker(self) -> None:
        body = {"belongs_to": self._belongs_to, "shards": self.digests}
        new = self.folder / f"{MARKER}.new"
        with new.open("w", encoding="utf-8") as file:
            file.write(json.dumps(body))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / MARKER)
        if os.name == "posix":  # elsewhere folders cannot be opened
            sync_folder(self.folder)


def partial_folder(output_dir: Path) -> Path:
    """Where a merge into `output_dir` is until it is whole."""
    return output_dir.with_name(f".{output_dir.name}.merging")


@contextmanager
def partial_merge(output_dir: Path, belongs_to: str) -> Iterator[PartialMerge]:
    """The hidden folder, for one process at a time; gets the output's name when all went well.

    If not it stays as it is, without the shard that was being written, so that the same command goes on;
    for bad input nothing stays.

    Raises:
        BadInput: another process merges into the same place.
        OutputExists: something came to be at `output_dir` meanwhile.
    """
    folder = partial_folder(output_dir)
    folder.mkdir(exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        if os.name == "posix" and not lock_file(lock.fileno()):
            rule = "is being written by another merge"
            raise BadInput(str(output_dir), rule, "Wait for it, or choose another --output-dir.")
        try:
            yield PartialMerge(folder, belongs_to)
            _finish(folder, output_dir)
        except BadInput:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _finish(folder: Path, output_dir: Path) -> None:
    for path in folder.iterdir():
        with path.open("r+b") as file:
            os.fsync(file.fileno())
    if output_dir.exists() or output_dir.is_symlink():
        raise OutputExists(str(output_dir), "came to be there meanwhile", "Choose another --output-dir.")
    (folder / MARKER).unlink()
    (folder / _LOCK).unlink()
    folder.rename(output_dir)
    if os.name == "posix":
        sync_folder(output_dir)
        sync_folder(output_dir.parent)


def write_shards(plan: MergePlan, recipe: Recipe, partial: PartialMerge, told: Told) -> None:
    """Write every shard that is not there yet.

    Raises:
        BadInput: a merged number is too large for the base's dtype, or is none.
        OSError: the disk is full, or broken.
    """
    with _a_core_for_the_writer():
        for shard, targets in plan.shards.items():
            if shard in partial.digests:
                told(sum(target.stored.place.size for target in targets))
                continue
            path = partial.folder / shard
            unfinished = path.with_name(f"{shard}.unfinished")
            try:
                digest = _write_shard(unfinished, targets, recipe, told)
                unfinished.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)
                raise
            partial.complete(shard, digest)


@contextmanager
def _a_core_for_the_writer() -> Iterator[None]:
    """Torch's threads wait for each other by spinning, and would take turns with the one that writes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(_MOST_THREADS, threads - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_shard(path: Path, targets: tuple[Target, ...], recipe: Recipe, told: Told) -> str:
    header, order = canonical_header({target.spec.name: target.spec for target in targets})
    by_name = {target.spec.name: target for target in targets}
    with _Writer(path, told) as writer:
        writer.write(memoryview(header), counts=False)
        for name in order:
            for block in _merged_blocks(by_name[name], recipe):
                writer.write(memoryview(block.numpy()))
    return writer.digest


def _merged_blocks(target: Target, recipe: Recipe) -> Iterator[torch.Tensor]:
    """The bytes of a tensor's rows; those that no adapter changes are copied as they are."""
    stored = target.stored
    if not target.pieces:
        for start, stop in blocks(stored):
            yield stored.read_bytes(start, stop)
        return
    import torch

    from train.merge_base import FLOATS

    dtype = getattr(torch, FLOATS[stored.place.spec.dtype])
    changes = [(recipe.weights[number], piece.load()) for number, piece in target.pieces]
    combined = Combined(target.spec.name, stored, changes, recipe)
    for start, stop in blocks(stored):
        merged = combined.merged(start, stored.read(start, stop))
        # Rounding keeps the order, so the least and the largest tell of all; a NaN is both.
        extremes = torch.stack(torch.aminmax(merged)) if merged.numel() else merged
        if not bool(torch.isfinite(extremes.to(dtype)).all()):
            rule = f"would hold NaN or infinity as {stored.place.spec.dtype} once it is merged"
            raise BadInput(target.spec.name, rule, "Lower --weights, or train with a smaller learning rate.")
        yield merged.to(dtype).contiguous().view(-1).view(torch.uint8)


class _Writer:
    """A new file, written and digested in a thread of its own; on the disk when it is closed."""

    def __init__(self, path: Path, told: Told) -> None:
        self._file, self._told = path.open("xb"), told
        self._digest = hashlib.sha256()
        self._thread = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *reason: object) -> None:
        try:
            if kind is None:
                self._wait(0)
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._thread.shutdown(cancel_futures=True)
            with contextlib.suppress(OSError):  # what is still in its buffer is of no use
                self._file.close()

    @property
    def digest(self) -> str:
        """SHA-256 of what was written."""
        return self._digest.hexdigest()

    def write(self, data: memoryview, counts: bool = True) -> None:
        """Hand over a block, which must not be changed afterwards; waits if too many are on their way."""
        self._wait(_AHEAD - 1)
        self._waiting.append(self._thread.submit(self._write, data))
        if counts:
            self._told(len(data))

    def _wait(self, left: int) -> None:
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    def _write(self, data: memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def write_index(plan: MergePlan, base_index: Mapping[str, object] | None, folder: Path, name: str) -> None:
    """The base's index with the tensors as they lie now; nothing for a model in one file."""
    if base_index is None:
        return
    metadata = base_index.get("metadata")
    body = {
        **base_index,
        "metadata": {
            **(metadata if isinstance(metadata, dict) else {}),
            "total_size": plan.size_bytes,
        },
        "weight_map": {
            target.spec.name: shard for shard, targets in plan.shards.items() for target in targets
        },
    }
    (folder / name).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
