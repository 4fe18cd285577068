"""The behaviour contract of an adapter, "chat settings" to users: how it wants to be asked.

An adapter folder carries files that the ecosystem already uses, `chat_template.jinja` and
`generation_config.json`, and `identity.json`, which says whether that template is the one the
adapter was trained with, how it wants to be asked, and where it comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.files import LinkRefused, NotRegularFile, TooLarge, read_whole
from vllm_lora_ext.peft_config import shown
from vllm_lora_ext.strict_json import JsonRefused, parse_object, plain_number

TEMPLATE_FILE = "chat_template.jinja"
IDENTITY_FILE = "identity.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer_config.json"
CHAT_FILES = (TEMPLATE_FILE, IDENTITY_FILE, GENERATION_FILE, TOKENIZER_FILE)
IDENTITY_FORMAT = 1
# Tokenizers of 260,000 tokens have configs of 1.2 MB; identity.json is read more than once.
_MAX_BYTES, _MAX_TOKENIZER_BYTES = 1 << 20, 8 << 20
_MAX_STOPS, _MAX_STOP, _MAX_SYSTEM_PROMPT, _MAX_FILES = 16, 1000, 64 << 10, 100
# Sampling settings of `generation_config.json` that mean the same to vLLM, with the values they may have.
_SAMPLING: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, 100.0),
    "max_new_tokens": (1, 1 << 31),
}


class BadChatSettings(BadInput):
    """A chat file that cannot be read, or says what cannot be; `code` is the finding's code."""

    def __init__(self, item: str, rule: str, fix: str, code: str = "chat_settings_invalid") -> None:
        self.code = code
        super().__init__(item, rule, fix)


@dataclass(frozen=True)
class ChatSettings:
    """`template` is Jinja, as transformers' `apply_chat_template` takes it; None means the base's own.

    `trained` is True only when `identity.json` vouches for exactly this template;
    a template that merely lies in the folder is used, and shown as unproven.
    `sampling` are the defaults of requests, by the names of `generation_config.json`.
    """

    template: str | None = None
    trained: bool = False
    system_prompt: str | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """One word for tables: `trained`, `unproven`, or `base` when the adapter brings none."""
        if self.template is None:
            return "base"
        return "trained" if self.trained else "unproven"

    def canonical(self) -> dict[str, Any]:
        """What decides how the adapter is asked, in one form only. Who vouches for it is not part of it."""
        template = None if self.template is None else _digest(self.template)
        return {
            "template_sha256": template,
            "system_prompt": self.system_prompt,
            "stop": list(self.stop),
            "sampling": {name: plain_number(value) for name, value in sorted(self.sampling.items())},
        }


@dataclass(frozen=True)
class Identity:
    """What `identity.json` says: the adapter's name, its trained template, and its provenance.

    `files` are SHA-256 digests of files beside it, which admission compares. `system_prompt` and `stop`
    apply to requests that say nothing of the kind; where there are none, nothing is written of them.
    """

    name: str
    template: str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str | None = None
    stop: tuple[str, ...] = ()

    def to_json(self) -> str:
        chat = {"system_prompt": self.system_prompt, "stop": list(self.stop)}
        body = {
            "format": IDENTITY_FORMAT,
            "name": self.name,
            "chat_template": {
                "file": TEMPLATE_FILE,
                "trained": True,
                "sha256": _digest(self.template),
            },
            **{key: value for key, value in chat.items() if value},
            "files": dict(self.files),
            "provenance": dict(self.provenance),
        }
        return json.dumps(body, indent=2, ensure_ascii=False) + "\n"


def write_contract(folder: Path, identity: Identity) -> None:
    """Write `chat_template.jinja` and `identity.json` into an adapter folder."""
    (folder / TEMPLATE_FILE).write_text(identity.template, encoding="utf-8", newline="")
    (folder / IDENTITY_FILE).write_text(identity.to_json(), encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether `folder` was written by our trainer, and so may be replaced when that is asked for."""
    try:
        body = _read_object(folder / IDENTITY_FILE, True)
    except BadInput:
        return False
    template = body.get("chat_template")
    return "format" in body and isinstance(template, dict) and "sha256" in template


def template_to_use(chat: ChatSettings, stated: str | None) -> str | None:
    """The adapter's own template, or None for the server's.

    A template that the user states with --chat-template wins over one that
    nobody vouches for, and gives way to the one an adapter was trained with:
    with any other the adapter would not do what it learned.
    """
    return None if stated and not chat.trained else chat.template


def read_chat_settings(folder: Path, follow_links: bool = True) -> ChatSettings:
    """The chat settings of any PEFT folder.

    The template is `chat_template.jinja`, else the one inside a saved
    tokenizer's `tokenizer_config.json` (older trainers), else none.

    Raises:
        BadChatSettings: a file is there and cannot be read, or says what cannot be.
    """
    template = _read_text(folder / TEMPLATE_FILE, follow_links)
    identity = _read_object(folder / IDENTITY_FILE, follow_links)
    trained = False
    if template is None:
        template = _tokenizers_template(folder / TOKENIZER_FILE, follow_links)
    else:
        vouched = identity.get("chat_template")
        if isinstance(vouched, dict) and vouched.get("trained") is True:
            trained = vouched.get("sha256") == _digest(template)
    system_prompt, stop = _system_prompt(identity), _stops(identity)
    _digests(identity)
    for text in (template, system_prompt, *stop):
        _check_text(text)
    sampling = _sampling(_read_object(folder / GENERATION_FILE, follow_links))
    return ChatSettings(template, trained, system_prompt, stop, sampling)


def read_provenance(folder: Path, follow_links: bool = True) -> dict[str, Any]:
    """What `identity.json` tells of where the adapter comes from; empty if there is none.

    Raises:
        BadChatSettings: it cannot be read.
    """
    provenance = _read_object(folder / IDENTITY_FILE, follow_links).get("provenance")
    return provenance if isinstance(provenance, dict) else {}


def stops_of_model(model: str) -> tuple[str, ...]:
    """The stop strings that a merged or wholly trained model keeps in its `identity.json`.

    None of a model without that file, of a hub id, or where the file is damaged: it is a base like any other.
    """
    try:
        return _stops(_read_object(Path(model) / IDENTITY_FILE, follow_links=True))
    except BadInput:
        return ()


def stated_digests(folder: Path, follow_links: bool = True) -> dict[str, str]:
    """The SHA-256 digests of files that `identity.json` states, by file name.

    Raises:
        BadChatSettings: it cannot be read, or states too many.
    """
    return _digests(_read_object(folder / IDENTITY_FILE, follow_links))


def _digests(identity: Mapping[str, Any]) -> dict[str, str]:
    files = identity.get("files")
    if not isinstance(files, dict):
        return {}
    if len(files) > _MAX_FILES or not all(name.isprintable() for name in files):
        rule = f"files must state the digests of at most {_MAX_FILES} files, by printable names"
        raise BadChatSettings(IDENTITY_FILE, rule, "Leave out what is not the adapter's.")
    return {name: digest for name, digest in files.items() if isinstance(digest, str)}


def _check_text(text: str | None) -> None:
    """JSON can hold half a character (a lone surrogate), which no file and no socket takes."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise BadChatSettings(
            "chat settings", f"hold a text that is no Unicode ({error.reason})", "Change it."
        ) from error


def _system_prompt(identity: Mapping[str, Any]) -> str | None:
    prompt = identity.get("system_prompt")
    if prompt is not None and (rule := system_prompt_problem(prompt)):
        raise BadChatSettings(IDENTITY_FILE, rule, "Change it.")
    return prompt or None


def system_prompt_problem(prompt: object) -> str | None:
    """The rule that a system prompt breaks, if it breaks one."""
    if isinstance(prompt, str) and len(prompt) <= _MAX_SYSTEM_PROMPT:
        return None
    return f"system_prompt must be a text of at most {_MAX_SYSTEM_PROMPT} characters"


def _stops(identity: Mapping[str, Any]) -> tuple[str, ...]:
    stops = identity.get("stop") or []
    if rule := stop_problem(stops):
        raise BadChatSettings(IDENTITY_FILE, rule, "Change it.")
    return tuple(stops)


def stop_problem(stops: Any) -> str | None:
    """The rule that stop strings break, if they break one."""
    listed = isinstance(stops, list | tuple)
    if listed and len(stops) <= _MAX_STOPS and all(map(_is_stop, stops)):
        return None
    return f"stop must be a list of at most {_MAX_STOPS} texts of 1 to {_MAX_STOP} characters"


def _is_stop(stop: object) -> bool:
    return isinstance(stop, str) and 0 < len(stop) <= _MAX_STOP


def _sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    sampling = {}
    for name, (least, most) in _SAMPLING.items():
        value = generation.get(name)
        if value is None:
            continue
        # Compared and not converted: a whole number may be larger than any float. NaN is in no range.
        if type(value) not in (int, float) or not least <= value <= most:
            rule = f"{name} must be a number from {least} to {most}, is {shown(value)}"
            raise BadChatSettings(GENERATION_FILE, rule, "Change it, or remove it.")
        sampling[name] = value
    return sampling


def _tokenizers_template(path: Path, follow_links: bool) -> str | None:
    """The template inside a saved tokenizer: a text, or a list of named ones."""
    template = _read_object(path, follow_links).get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) and template else None


_INVALID = "chat_settings_invalid"
_CODES = {LinkRefused: "link_refused", NotRegularFile: "not_regular_file", TooLarge: "too_large"}


def _read(path: Path, follow_links: bool) -> bytes | None:
    """A file's content, byte for byte; None if there is none."""
    try:
        limit = _MAX_TOKENIZER_BYTES if path.name == TOKENIZER_FILE else _MAX_BYTES
        return read_whole(path, limit, follow_links)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), _INVALID)
        rule = f"cannot be read ({reason})"
        raise BadChatSettings(path.name, rule, "Repair the file, or remove it.", code) from error


def _read_text(path: Path, follow_links: bool) -> str | None:
    """The file's text; no line ending is changed, since a template's digest counts."""
    data = _read(path, follow_links)
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError as error:
        fix = "Save it as UTF-8, or remove it."
        raise BadChatSettings(path.name, f"is not UTF-8 (byte {error.start})", fix) from error


def _digest(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


def _read_object(path: Path, follow_links: bool) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no file. Others' files may hold more than the standard."""
    data = _read(path, follow_links)
    if data is None:
        return {}
    try:
        if path.name == IDENTITY_FILE:
            return parse_object(data)
        body = json.loads(data)
    except JsonRefused as error:
        raise BadChatSettings(path.name, error.rule, "Repair the file, or remove it.") from error
    except (ValueError, RecursionError) as error:
        rule = f"cannot be read as JSON ({error})"
        raise BadChatSettings(path.name, rule, "Repair the file, or remove it.") from error
    return body if isinstance(body, dict) else {}
