"""Flags that several commands share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.spec import EngineLimits


def at_least(least: int) -> Callable[[str], int]:
    """A flag's type: a whole number, not below `least`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, is {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, is {text}")
        return number

    return whole_number


def add_rules_flags(parser: argparse._ActionsContainer) -> None:
    """What adapters are judged by."""
    parser.add_argument(
        "--base-model", metavar="DIR_OR_HUB_ID", help="default: the one that the adapters name"
    )
    add_allow_flag(parser)


def add_allow_flag(parser: argparse._ActionsContainer) -> None:
    """`--allow CODE`, as often as needed."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="CODE",
        help="do not refuse for this finding, unless it is about security; may be given several times",
    )


def read_rules(args: argparse.Namespace, base: BaseModel | None, limits: EngineLimits | None = None) -> Rules:
    """The rules that the flags state."""
    names = (base.public_name,) if base else ()
    return Rules(base, names, limits or EngineLimits(), frozenset(args.allow))
