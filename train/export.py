"""A trained model becomes a folder, of an adapter or of a whole model: complete, or not there at all."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from train.adapter_files import adapter_config, adapter_tensors
from train.model import first_line
from vllm_lora_ext.contract import GENERATION_FILE, Identity, is_ours, write_contract
from vllm_lora_ext.errors import BadSetting, OutputExists, TrainingFailed
from vllm_lora_ext.files import sync_folder
from vllm_lora_ext.peft_format import CONFIG_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FULL = (errno.ENOSPC, errno.EDQUOT)


def _nothing(folder: Path) -> None:
    """No further files."""


@dataclass(frozen=True)
class Extras:
    """What a folder gets beside the weights, and what a person is told if it cannot be written.

    `write` is called with the folder before it has its name, and puts further files there (a model card, a
    log). `sampling` are defaults of requests, by the names of `generation_config.json`. `checkpoint` is
    where the trained weights lie meanwhile.
    """

    write: Callable[[Path], None] = _nothing
    sampling: Mapping[str, float] = field(default_factory=dict)
    checkpoint: Path | None = None


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


def export_adapter(
    model: PeftModel,
    folder: Path,
    identity: Identity,
    overwrite: bool,
    extras: Extras = Extras(),
) -> None:
    """Write a PEFT folder with its trained template, chat settings and `identity.json` to `folder`.

    The weights are float32, as they were trained. `identity.json` states the digests of config and weights,
    so that a half-copied folder is noticed.

    Raises:
        OutputExists, BadSetting: as `check_output`.
        TrainingFailed: it could not be written; nothing of it is left.
    """
    from safetensors.torch import save_file

    with written_whole(folder, overwrite, extras) as staging:
        config = json.dumps(adapter_config(model), indent=2, ensure_ascii=False) + "\n"
        (staging / CONFIG_FILE).write_text(config, encoding="utf-8")
        save_file(adapter_tensors(model), staging / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_chat(staging, identity, (CONFIG_FILE, WEIGHTS_FILE), extras, model)


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    identity: Identity,
    overwrite: bool,
    dtype: torch.dtype,
    extras: Extras = Extras(),
) -> None:
    """Write a whole model, with tokenizer, chat template and `identity.json`, to `folder`.

    `model` itself is cast to `dtype`, the one that its base is stored in: each weight is rounded once, here.
    What a server reads of a base model is its template and `generation_config.json`: a system prompt is put
    into the template. Its stop strings stay in `identity.json`, from where `vllm-lora serve` takes them.

    Raises:
        OutputExists, BadSetting: as `check_output`.
        TrainingFailed: it could not be written; nothing of it is left.
    """
    identity = dataclasses.replace(identity, template=whole_template(identity))
    tokenizer.chat_template = identity.template
    with written_whole(folder, overwrite, extras) as staging:
        model.to(dtype=dtype).save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))
        files = sorted(path.name for path in staging.glob("*.safetensors"))
        _write_chat(staging, identity, ("config.json", *files), extras, model)


def whole_template(identity: Identity) -> str:
    """A whole model's: in front of it a conversation without a system message gets the identity's."""
    if not identity.system_prompt:
        return identity.template
    message = json.dumps({"role": "system", "content": identity.system_prompt}, ensure_ascii=False)
    return (
        "{%- if messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{message}] + messages %}}"
        "{%- endif %}" + identity.template
    )


@contextmanager
def written_whole(folder: Path, overwrite: bool, extras: Extras) -> Iterator[Path]:
    """As `finished_folder`, with a message of its own for a disk that is full or broken."""
    from safetensors import SafetensorError

    try:
        with finished_folder(folder, overwrite) as staging:
            yield staging
            for path in staging.rglob("*"):
                if path.is_file():
                    _sync(path)
        if os.name == "posix":  # elsewhere folders cannot be opened
            sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for what the system says
        full = getattr(error, "errno", None) in _FULL or "StorageFull" in str(error)
        reason = "the disk is full" if full else getattr(error, "strerror", None) or first_line(error)
        fix = "Free some space, or choose another --output-dir; nothing half-written is left."
        if extras.checkpoint is not None:
            fix += f" What was trained is in {extras.checkpoint}; --resume goes on from there."
        raise TrainingFailed(str(folder), f"cannot be written ({reason})", fix) from error


def _write_chat(
    staging: Path,
    identity: Identity,
    digested: Sequence[str],
    extras: Extras,
    model: PeftModel | PreTrainedModel,
) -> None:
    """What else stands in the folder."""
    path = staging / GENERATION_FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else _end_tokens(model)
    known.pop("_from_model_config", None)  # with this mark transformers would make the file anew
    if extras.sampling:
        sampled = {"do_sample": extras.sampling.get("temperature", 1) > 0}  # as vLLM reads a temperature of 0
        known |= {**sampled, **extras.sampling}
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    extras.write(staging)
    digests = {name: sha256_of(staging / name) for name in digested}
    write_contract(staging, dataclasses.replace(identity, files=digests))


def _end_tokens(model: PeftModel | PreTrainedModel) -> dict[str, object]:
    """The base's ids of the tokens that begin, end and fill a text, as far as it has them."""
    known = model.generation_config.to_dict()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: known[name] for name in names if known.get(name) is not None}


def _sync(path: Path) -> None:
    """On the disk before the folder has its name: a loss of power leaves no adapter of zeros."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The digest of a file, as `identity.json` states it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
