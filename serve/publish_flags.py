"""What `vllm-lora publish` is told: the one adapter, and chat settings stated over its own."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.files import read_whole
from vllm_lora_ext.peft_format import is_adapter_folder
from vllm_lora_ext.sources import AdapterSource, find_sources, name_and_place

_MAX_TEMPLATE_BYTES = 1 << 20


def one_source(value: str, name: str | None) -> AdapterSource:
    """The adapter behind `DIR|URL`.

    Raises:
        BadSetting: it is no adapter, or several.
    """
    _, place = name_and_place(value)
    if "://" not in place and Path(place).is_dir() and not is_adapter_folder(Path(place)):
        raise BadSetting(value, "is a folder of adapters, or none at all", "Publish one adapter at a time.")
    (source,) = find_sources([value])
    return source if name is None else dataclasses.replace(source, name=name)


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """Chat settings that somebody states for an adapter, which win over those in its folder."""
    group = parser.add_argument_group("chat settings", "in place of those that the adapter's folder has")
    template = group.add_mutually_exclusive_group()
    template.add_argument(
        "--prompt-template", metavar="TEXT", help=r"for example 'Human: {instruction}\n\nAssistant: '"
    )
    template.add_argument("--chat-template", type=Path, metavar="FILE", help="a chat template in Jinja")
    group.add_argument("--system", metavar="TEXT", help="the system prompt")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer here; may be given several times"
    )


def read_chat(args: argparse.Namespace) -> ChatOverride:
    """The chat settings that the flags state."""
    stop = None if args.stop is None else tuple(args.stop)
    template = None if args.chat_template is None else _read_template(args.chat_template)
    return ChatOverride(template, args.prompt_template, args.system, stop)


def _read_template(path: Path) -> str:
    try:
        return read_whole(path, _MAX_TEMPLATE_BYTES).decode("utf-8")
    except OSError as error:
        raise BadSetting(
            f"--chat-template {path}", f"cannot be read ({error.strerror})", "Check it."
        ) from error
    except ValueError as error:
        raise BadSetting(f"--chat-template {path}", f"is no template ({error})", "Check the file.") from error
