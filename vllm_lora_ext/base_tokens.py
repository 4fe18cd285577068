"""The special tokens of a base model that a text form needs, read from its files without a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.contract import TOKENIZER_FILE
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.files import read_whole

_MAX_TOKENIZER_BYTES = 256 << 20
_GIVE_A_TEMPLATE = "Repair the base model's folder, or give a Jinja template with --chat-template."


def end_and_begin(base: BaseModel | None) -> tuple[str, str]:
    """A base's end token, and the begin token that its tokenizer puts in front of plain text, if any.

    Raises:
        BadSetting: there is no base, or it has no end token that could be read.
    """
    if base is None:
        rule = "needs the base model, whose end token ends an answer"
        raise BadSetting("prompt_text", rule, "Name the base model, or give a Jinja template instead.")
    try:
        return _tokens(base.name)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        rule = f"{TOKENIZER_FILE} cannot be read for its end token ({type(error).__name__})"
        raise BadSetting(base.public_name, rule, _GIVE_A_TEMPLATE) from error
    except _NoEndToken as error:
        rule = f"has no end token in {TOKENIZER_FILE}, so an answer could not end"
        raise BadSetting(base.public_name, rule, _GIVE_A_TEMPLATE) from error


class _NoEndToken(Exception):
    """The tokenizer's config states none."""


@lru_cache(maxsize=16)  # a folder of adapters has one base
def _tokens(name: str) -> tuple[str, str]:
    config = _read_object(name, TOKENIZER_FILE)
    end, begin = _token(config.get("eos_token")), _token(config.get("bos_token"))
    if not end:
        raise _NoEndToken
    adds_begin = config.get("add_bos_token")
    if adds_begin is None and begin:  # then the tokenizer itself decides, as in Llama 3
        adds_begin = _starts_with(_post_processor(name), begin)
    return end, begin if adds_begin is True else ""


def _token(value: Any) -> str:
    """A special token: its text, or an object around it in the files of older tokenizers."""
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else ""


def _post_processor(name: str) -> Any:
    try:
        return _read_object(name, "tokenizer.json").get("post_processor")
    except FileNotFoundError:  # tokenizers of other kinds say it in their config
        return None


def _starts_with(processor: Any, begin: str) -> bool:
    """Whether a post-processor of the tokenizers library begins a single text with this token."""
    if not isinstance(processor, Mapping):
        return False
    if processor.get("type") == "Sequence":
        return any(_starts_with(part, begin) for part in processor.get("processors") or [])
    first = next(iter(processor.get("single") or []), None)
    special = first.get("SpecialToken") if isinstance(first, Mapping) else None
    return isinstance(special, Mapping) and special.get("id") == begin


def _read_object(name: str, file: str) -> dict[str, Any]:
    """A JSON object of a base that is a folder here, or a hub id."""
    folder = Path(name)
    path = folder / file if folder.is_dir() else _from_hub(name, file)
    body = json.loads(read_whole(path, _MAX_TOKENIZER_BYTES))
    if not isinstance(body, dict):
        raise ValueError(f"{file} holds no object")
    return body


def _from_hub(name: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, file))
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(file) from error
    except LocalEntryNotFoundError as error:  # the hub may have it, and cannot be asked
        raise OSError(str(error)) from error
