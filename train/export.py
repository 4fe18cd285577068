"""A trained model becomes an adapter folder: complete under its name, or not there at all."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_lora_ext.contract import Identity, is_ours, write_contract
from vllm_lora_ext.errors import BadSetting, OutputExists
from vllm_lora_ext.peft_format import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    from peft import PeftModel


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse early what could not be written at the end, and make the folder that it goes into.

    Raises:
        OutputExists: the folder is there and is not ours, or is ours and `overwrite` is off.
        BadSetting: nothing can be written beside it.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder.parent, os.W_OK | os.X_OK)
    except OSError as error:
        rule = f"cannot be made ({error.strerror})"
        raise BadSetting(str(folder.parent), rule, "Choose another --output-dir.") from error
    if not writable:
        raise BadSetting(str(folder.parent), "is not writable", "Choose another --output-dir.")
    if not folder.exists() and not folder.is_symlink():
        return
    if not is_ours(folder):
        raise OutputExists(
            str(folder),
            "is there already and was not written by this tool",
            "Choose another --name or --output-dir.",
        )
    if not overwrite:
        raise OutputExists(
            str(folder),
            "holds an adapter already",
            "Add --overwrite to replace it, or change --name.",
        )


@contextmanager
def finished_folder(folder: Path, overwrite: bool = False) -> Iterator[Path]:
    """A hidden folder to write into, renamed to `folder` when all went well, else removed.

    An adapter that stood there before is moved aside first, so that a reader
    sees the old one, for an instant none, then the new one; never a mixture.
    Whether it may be replaced is asked again at the end: work takes time.

    Raises:
        OutputExists, BadSetting: as `check_output`.
    """
    check_output(folder, overwrite)
    mark = uuid.uuid4().hex[:8]
    staging = folder.with_name(f".{folder.name}.{mark}.partial")
    previous = folder.with_name(f".{folder.name}.{mark}.previous")
    staging.mkdir()
    try:
        yield staging
        check_output(folder, overwrite)
        if folder.exists():
            folder.rename(previous)
        staging.rename(folder)
    except BaseException:
        if previous.exists() and not folder.exists():
            previous.rename(folder)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def export_adapter(model: PeftModel, folder: Path, identity: Identity, overwrite: bool) -> None:
    """Write the PEFT folder with its trained template and `identity.json` to `folder`.

    `identity.json` states the digests of config and weights, so that a half-copied folder is noticed.
    """
    with finished_folder(folder, overwrite) as staging:
        model.save_pretrained(str(staging))
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
        digests = {name: _sha256(staging / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        write_contract(staging, dataclasses.replace(identity, files=digests))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
