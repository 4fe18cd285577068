"""A trained model becomes an adapter folder: complete under its name, or not there at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.contract import Identity, is_ours, write_contract
from vllm_lora_ext.errors import OutputExists

if TYPE_CHECKING:
    from peft import PeftModel


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse early what could not be written at the end.

    Raises:
        OutputExists: the folder is there and is not ours, or is ours and `overwrite` is off.
    """
    if not folder.exists():
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
def finished_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, renamed to `folder` when all went well, else removed.

    An adapter that stood there before is moved aside first, so that a reader
    sees the old one, for an instant none, then the new one; never a mixture.
    """
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    previous = folder.with_name(f".{folder.name}.{os.getpid()}.previous")
    staging.mkdir(parents=True)
    try:
        yield staging
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


def export_adapter(
    model: PeftModel, folder: Path, name: str, template: str, provenance: Mapping[str, Any]
) -> None:
    """Write the PEFT folder with its trained template and `identity.json` to `folder`."""
    with finished_folder(folder) as staging:
        model.save_pretrained(str(staging))
        (staging / "README.md").unlink(missing_ok=True)  # PEFT's model card is an empty form
        write_contract(staging, Identity(name, template, provenance))
