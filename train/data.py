"""Rows as users have them, from files and datasets, read and checked; what is bad is counted and named."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.formats import TEXT_SUFFIXES, Found, read_file
from train.records import parse_columns, row_of
from train.rows import Row, split_rows
from vllm_lora_ext.errors import BadData

__all__ = ["Data", "Row", "digest_of", "read_data", "read_rows", "refusal", "split_rows"]

_SHOWN = 5  # bad rows named per message; the count says how many there are


@dataclass(frozen=True)
class Data:
    """The rows that can be trained on, in order, and why each of the others cannot."""

    rows: list[Row]
    bad: list[BadData]


def read_data(
    sources: Sequence[str],
    columns: Sequence[str] = (),
    split: str = "train",
    skip_bad_rows: bool = False,
) -> Data:
    """All rows of all sources (files, dataset folders, hub ids); `columns` as PART=COLUMN.

    Raises:
        BadData: a source is missing, empty or unreadable; a row is bad and `skip_bad_rows` is off; or all
            rows are bad.
        BadSetting: `columns` cannot be understood.
    """
    mapping = parse_columns(columns)
    data, seen = Data([], []), set[str]()
    for position, source in enumerate(sources):
        before = len(data.rows) + len(data.bad)
        for found in _read_source(source, split):
            if isinstance(found, BadData):
                data.bad.append(found)
                continue
            seen |= found.value.keys() if isinstance(found.value, dict) else set()
            try:
                data.rows.append(row_of(found, mapping, position))
            except BadData as error:
                data.bad.append(error)
        if len(data.rows) + len(data.bad) == before:
            raise BadData(source, "holds no row", "Add rows of instruction, input and output.")
    if data.bad and not (skip_bad_rows and data.rows):
        raise refusal(data.bad, len(data.rows))
    for part, column in mapping.items():
        if column not in seen:  # an optional part; the others were missed row by row
            raise BadData(f"--columns {part}={column}", "is a column of no row", f"There are {_some(seen)}.")
    return data


def read_rows(sources: Sequence[str]) -> list[Row]:
    """All rows of all sources, each of them good.

    Raises:
        BadData: as `read_data`.
    """
    return read_data(sources).rows


def refusal(bad: Sequence[BadData], fine: int) -> BadData:
    """The error for bad rows (at least one) among `fine` good ones: all counted, the first five named.

    A rule that every row breaks, such as a missing column, is said once.
    """
    total = len(bad) + fine
    fix = bad[0].fix
    if fine:
        fix += " --skip-bad-rows leaves such rows out."
    if len(bad) == total > 1 and len({error.rule for error in bad}) == 1:
        return BadData(bad[0].item, f"{bad[0].rule}; so it is with all {total} rows", fix)
    shown = "; ".join(f"{error.item}: {error.rule}" for error in bad[:_SHOWN])
    if len(bad) > _SHOWN:
        shown += "; ..."
    verb = "is" if fine == 1 else "are"
    return BadData(shown, f"{len(bad)} of {total} rows cannot be used, {fine} {verb} fine", fix)


def digest_of(sources: Sequence[str], split: str = "train") -> str:
    """SHA-256 over the files' bytes, in order; a dataset counts by its name, split and fingerprint.

    Raises:
        BadData: a dataset cannot be loaded.
    """
    digest = hashlib.sha256()
    for source in sources:
        if Path(source).is_file():
            with Path(source).open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        else:
            from train.tables import dataset_fingerprint

            digest.update("\0".join([source, split, dataset_fingerprint(source, split)]).encode())
    return digest.hexdigest()


def _read_source(source: str, split: str) -> Iterator[Found]:
    from train.tables import read_dataset, read_parquet

    path = Path(source)
    try:
        is_file, is_folder, exists = path.is_file(), path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name that no file system takes
        is_file = is_folder = exists = False
    if is_file:
        return read_parquet(path) if path.suffix.lower() == ".parquet" else read_file(path)
    if exists and not is_folder:
        raise BadData(source, "is neither a file nor a folder", "Check --data.")
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if not is_folder and (looks_like_path or path.suffix.lower() in (*TEXT_SUFFIXES, ".parquet")):
        raise BadData(source, "no such file", "Check --data.")
    return read_dataset(source, split)


def _some(names: set[str]) -> str:
    return ", ".join(sorted(map(str, names))[:20]) or "none"
