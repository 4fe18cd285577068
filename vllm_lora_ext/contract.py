"""The behaviour contract of an adapter, "chat settings" to users: how it wants to be asked.

An adapter folder carries `chat_template.jinja`, the file that transformers and
vLLM already use, and `identity.json`, which says whether that template is the
one the adapter was trained with, and where the adapter comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadInput

TEMPLATE_FILE = "chat_template.jinja"
IDENTITY_FILE = "identity.json"
IDENTITY_FORMAT = 1


@dataclass(frozen=True)
class ChatSettings:
    """`template` is Jinja, as transformers' `apply_chat_template` takes it; None means the base's own.

    `trained` is True only when `identity.json` vouches for exactly this template;
    a template that merely lies in the folder is used, and shown as unproven.
    """

    template: str | None = None
    trained: bool = False

    @property
    def state(self) -> str:
        """One word for tables: `trained`, `unproven`, or `base` when the adapter brings none."""
        if self.template is None:
            return "base"
        return "trained" if self.trained else "unproven"


@dataclass(frozen=True)
class Identity:
    """What `identity.json` says: the adapter's name, its trained template, and its provenance."""

    name: str
    template: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        body = {
            "format": IDENTITY_FORMAT,
            "name": self.name,
            "chat_template": {
                "file": TEMPLATE_FILE,
                "trained": True,
                "sha256": _digest(self.template),
            },
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
        body = _read_object(folder / IDENTITY_FILE)
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


def read_chat_settings(folder: Path) -> ChatSettings:
    """The chat settings of any PEFT folder.

    The template is `chat_template.jinja`, else the one inside a saved
    tokenizer's `tokenizer_config.json` (older trainers), else none.

    Raises:
        BadInput: a file is there and cannot be read.
    """
    path = folder / TEMPLATE_FILE
    if path.exists():
        template = _read_text(path)
        vouched = _read_object(folder / IDENTITY_FILE).get("chat_template")
        trained = (
            isinstance(vouched, dict)
            and vouched.get("trained") is True
            and vouched.get("sha256") == _digest(template)
        )
        return ChatSettings(template, trained)
    legacy = _read_object(folder / "tokenizer_config.json").get("chat_template")
    return ChatSettings(legacy if isinstance(legacy, str) and legacy else None)


def _read_text(path: Path) -> str:
    """The file's text, byte for byte: no line ending is changed, since a template's digest counts."""
    if not path.is_file():  # a pipe would never end
        raise BadInput(str(path), "is no regular file", "Remove it.")
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fix = "Repair the file, or remove it."
        raise BadInput(str(path), f"cannot be read ({error})", fix) from error


def _digest(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            str(path), f"cannot be read as JSON ({error})", "Repair the file, or remove it."
        ) from error
    return body if isinstance(body, dict) else {}
