"""Parquet files and datasets, from a folder or from the hub, become records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from train.formats import Found, Record
from vllm_lora_ext.errors import BadData

_HUB_ID = re.compile(
    r"(?P<path>[\w.-]+(?:/[\w.-]+)?)(?::(?P<name>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?", re.ASCII
)


def read_parquet(path: Path) -> Iterator[Found]:
    """The rows of a Parquet file, in order.

    Raises:
        BadData: it is none, or is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Record(value, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        rule = f"cannot be read as Parquet ({_first_line(error)})"
        raise BadData(f"{path} row {number + 1}" if number else str(path), rule, "Write it again.") from error


def read_dataset(source: str, split: str) -> Iterator[Found]:
    """The rows of a dataset: a folder, or a hub id as `owner/name[:config][@revision]`.

    Raises:
        BadData: it cannot be had, or has no such split.
    """
    dataset = _load(source, split)
    try:
        for number, value in enumerate(dataset, start=1):
            yield Record(value, f"{source} row {number}")
    except Exception as error:  # columns that need further packages, damaged files
        raise BadData(source, f"cannot be read ({_first_line(error)})", "Load it again.") from error


def dataset_fingerprint(source: str, split: str) -> str:
    """What `datasets` knows this state of the dataset by.

    Raises:
        BadData: as `read_dataset`.
    """
    return str(_load(source, split)._fingerprint)


@lru_cache(maxsize=4)  # rows and fingerprint of one dataset are asked for one after the other
def _load(source: str, split: str) -> Any:
    import datasets

    folder = Path(source)
    try:
        if folder.is_dir():
            found = _load_folder(folder, split)
        elif match := _HUB_ID.fullmatch(source):
            found = datasets.load_dataset(**match.groupdict(), split=split)
        else:
            raise BadData(source, "is neither a file, a folder nor a dataset's hub id", "Check --data.")
    except BadData:
        raise
    except Exception as error:  # the library lets through whatever its loaders and the network raise
        rule = f"cannot be loaded as a dataset ({_first_line(error)})"
        fix = "Check the spelling and --data-split; a dataset of several parts is named owner/name:part."
        raise BadData(source, rule, fix) from error
    return found


def _load_folder(folder: Path, split: str) -> Any:
    """A folder that `save_to_disk` wrote, or one of data files."""
    import datasets

    if not any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_dataset(str(folder), split=split)
    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise BadData(str(folder), f"has no split `{split}`, has {', '.join(found)}", "Give --data-split.")
    return found[split]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
