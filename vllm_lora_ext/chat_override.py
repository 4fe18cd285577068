"""Chat settings that somebody states for an adapter, over what its folder says."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.chat_template import MAX_TEMPLATE_BYTES
from vllm_lora_ext.contract import TOKENIZER_FILE, ChatSettings, stop_problem, system_prompt_problem
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.files import read_whole
from vllm_lora_ext.prompt_text import text_template
from vllm_lora_ext.strict_json import canonical

_ITEM = "chat settings"
_MAX_TOKENIZER_BYTES = 256 << 20
_GIVE_A_TEMPLATE = "Repair the base model's folder, or give a Jinja template with --chat-template."


@dataclass(frozen=True)
class ChatOverride:
    """What somebody states for an adapter over what its folder says; None leaves that as it is.

    `template` is Jinja, `prompt_text` a text form with `{instruction}`, which becomes a template with the
    base's end token. An empty `system_prompt` or `stop` means none.

    Raises:
        BadSetting: a value is none of its kind, or too large.
    """

    template: str | None = None
    prompt_text: str | None = None
    system_prompt: str | None = None
    stop: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if rule := self._problem():
            raise BadSetting(_ITEM, rule, "Change it.")
        if self.prompt_text is not None:
            text_template(self.prompt_text, "")

    def _problem(self) -> str | None:
        for name in ("template", "prompt_text"):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= MAX_TEMPLATE_BYTES):
                return f"{name} must be a text of at most {MAX_TEMPLATE_BYTES} characters"
        if self.template is not None and self.prompt_text is not None:
            return "template and prompt_text say the same thing twice"
        if self.system_prompt is not None and (rule := system_prompt_problem(self.system_prompt)):
            return rule
        if self.stop is not None and (rule := stop_problem(self.stop)):
            return rule
        try:
            canonical(self.to_json())
        except UnicodeEncodeError as error:
            return f"hold a text that is no Unicode ({error.reason})"
        return None

    def apply(self, chat: ChatSettings, base: BaseModel | None) -> ChatSettings:
        """`chat` with what is stated. A stated template counts as trained: a person vouches for it.

        Raises:
            BadSetting: the base's end token, which `prompt_text` needs, cannot be had.
        """
        template = self.template
        if self.prompt_text is not None:
            template = text_template(self.prompt_text, *_end_and_begin(base))[0]
        if template is not None:
            chat = dataclasses.replace(chat, template=template, trained=True)
        if self.system_prompt is not None:
            chat = dataclasses.replace(chat, system_prompt=self.system_prompt or None)
        if self.stop is not None:
            chat = dataclasses.replace(chat, stop=self.stop)
        return chat

    @property
    def digest(self) -> str:
        """Equal for equal statements; empty when nothing is stated."""
        body = self.to_json()
        return hashlib.sha256(canonical(body)).hexdigest() if body else ""

    def to_json(self) -> dict[str, Any]:
        """What is stated, as JSON values."""
        stop = None if self.stop is None else list(self.stop)
        body = {**dataclasses.asdict(self), "stop": stop}
        return {name: value for name, value in body.items() if value is not None}

    @classmethod
    def from_json(cls, body: object) -> ChatOverride:
        """The inverse of `to_json`, for what comes from somebody else.

        Raises:
            BadSetting: it is no object, has a key that is none of ours, or a value as above.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(body, dict) or not set(body) <= known:
            rule = f"must be a JSON object with no other keys than {', '.join(sorted(known))}"
            raise BadSetting(_ITEM, rule, "Change it.")
        stop = body.get("stop")
        return cls(**{**body, "stop": tuple(stop) if isinstance(stop, list) else stop})


AS_IT_IS = ChatOverride()  # nothing is stated


def _end_and_begin(base: BaseModel | None) -> tuple[str, str]:
    if base is None:
        rule = "needs the base model, whose end token ends an answer"
        raise BadSetting("prompt_text", rule, "Name the base model, or give a Jinja template instead.")
    try:
        return _tokens(base.name)
    except (OSError, ValueError, RecursionError) as error:
        rule = f"{TOKENIZER_FILE} cannot be read for its end token ({type(error).__name__})"
        raise BadSetting(base.public_name, rule, _GIVE_A_TEMPLATE) from error
    except _NoEndToken as error:
        rule = f"has no end token in {TOKENIZER_FILE}, so an answer could not end"
        raise BadSetting(base.public_name, rule, _GIVE_A_TEMPLATE) from error


class _NoEndToken(Exception):
    """The tokenizer's config states none."""


@lru_cache(maxsize=16)  # a folder of adapters has one base
def _tokens(name: str) -> tuple[str, str]:
    """A base's end token, and the begin token that its tokenizer puts in front of plain text, if any."""
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
    except FileNotFoundError:
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
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(name, file))
    except EntryNotFoundError as error:
        raise FileNotFoundError(file) from error
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error
