"""Flags over the YAML file named by `--config`, over the defaults, become what is to be trained."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.identities import JointConfig, read_identities
from train.settings_file import as_yaml, kind_of, read_settings

_JOINT = tuple(item.name for item in fields(JointConfig) if item.metadata)


def parse_config(argv: Sequence[str]) -> TrainConfig | JointConfig:
    """Flags over the YAML file named by `--config`, over the defaults.

    Raises:
        BadSetting: a file cannot be read, a key is unknown, or a value has the wrong type.
        IdentitiesRefused: with `--identities`, everything that is wrong with any of them.
        SystemExit: argparse refused the flags (exit code 2), `--help`, or `--print-config` (printed).
    """
    parser = _parser()
    given = vars(parser.parse_args(argv))
    wants_print, path = given.pop("print_config"), given.pop("config", None)
    common = read_settings(Path(path)) if path else {}
    joint = {name: given.pop(name) for name in _JOINT if name in given}
    if place := given.pop("identities", None):
        if wants_print:
            parser.error("--print-config is about a single run")
        return JointConfig(read_identities(Path(place), common, given), **joint)
    if joint:
        parser.error(f"--{min(joint).replace('_', '-')} needs --identities")
    values = {**common, **given}
    missing = [
        f"--{item.name.replace('_', '-')}"
        for item in fields(TrainConfig)
        if item.default is dataclasses.MISSING and item.name not in values
    ]
    if missing:
        parser.error(f"these are needed, as flags or in --config: {', '.join(missing)}")
    config = TrainConfig(**values)
    if wants_print:
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-lora train",
        description="Train an identity: a LoRA adapter, or a whole model, on rows of questions and answers; "
        "or several of them in one run.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file; flags win")
    for item in fields(TrainConfig):
        _add_flag(parser, item)
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and end")
    group = parser.add_argument_group("several identities in one run", "see docs/joint-training.md")
    group.add_argument(
        "--identities",
        default=argparse.SUPPRESS,
        metavar="FILE.yaml|DIR",
        help="the identities, each with settings of its own; settings for all are flags, or in the file",
    )
    for item in fields(JointConfig):
        if item.metadata:
            _add_flag(group, item)
    return parser


def _add_flag(parser: argparse._ActionsContainer, item: dataclasses.Field[Any]) -> None:
    options: dict[str, Any] = dict(item.metadata)
    text = options["help"]
    if item.default not in (dataclasses.MISSING, False, None):
        shown = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        text += f" (default: {shown})" if shown != "" else ""
    options["help"] = text
    if item.type == "bool":
        options["action"] = argparse.BooleanOptionalAction
    else:
        numbers = {"int": int, "float": float, "tuple[float, ...]": float}
        options["type"] = numbers.get(kind_of(item), str)
        if options.get("nargs"):
            options["action"] = _Tuple
    parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **options)


class _Tuple(argparse.Action):
    """Store a list flag as a tuple, so that the config stays frozen."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, tuple(values))
