"""Flags over the YAML file named by `--config`, over the defaults, become one `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from vllm_lora_ext.errors import BadSetting


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Flags over the YAML file named by `--config`, over the defaults.

    Raises:
        BadSetting: the file cannot be read, a key is unknown, or a value has the wrong type.
        SystemExit: argparse refused the flags (exit code 2), `--help`, or `--print-config` (printed).
    """
    known = fields(TrainConfig)
    parser = argparse.ArgumentParser(
        prog="vllm-lora train",
        description="Train an identity: a LoRA adapter, or a whole model, on rows of questions and answers.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file; flags win")
    for item in known:
        _add_flag(parser, item)
    parser.add_argument("--print-config", action="store_true", help="print all settings as YAML, and end")
    given = vars(parser.parse_args(argv))
    wants_print = given.pop("print_config")
    path = given.pop("config", None)
    values = {**(_read_yaml(Path(path)) if path else {}), **given}
    missing = [
        f"--{item.name.replace('_', '-')}"
        for item in known
        if item.default is dataclasses.MISSING and item.name not in values
    ]
    if missing:
        parser.error(f"these are needed, as flags or in --config: {', '.join(missing)}")
    config = TrainConfig(**values)
    if wants_print:
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any]) -> None:
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
        options["type"] = numbers.get(_kind(item), str)
        if options.get("nargs"):
            options["action"] = _Tuple
    parser.add_argument(f"--{item.name.replace('_', '-')}", default=argparse.SUPPRESS, **options)


def _kind(item: dataclasses.Field[Any]) -> str:
    """The field's type as it is written, without the `None` of an open default."""
    return str(item.type).removesuffix(" | None")


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


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadSetting(str(path), f"cannot be read as YAML ({error})", "Check --config.") from error
    if not isinstance(body, dict):
        raise BadSetting(str(path), "must hold settings as `key: value`", "See examples/classic.yaml.")
    known = {item.name: item for item in fields(TrainConfig)}
    values = {}
    for raw_key, value in body.items():
        key = str(raw_key).replace("-", "_")
        if key not in known:
            raise BadSetting(f"{path}: {raw_key}", "is no setting", _nearest(key, sorted(known)))
        values[key] = _typed(f"{path}: {raw_key}", value, known[key])
    return values


def _typed(where: str, value: Any, item: dataclasses.Field[Any]) -> Any:
    """A YAML value as the field's type; a lone string where several may stand is one of them."""
    kind = _kind(item)
    choices = item.metadata.get("choices")
    if value is None and str(item.type).endswith("| None"):
        return None
    if kind.startswith("tuple"):
        return _typed_list(where, value, item)
    if kind == "float" and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 5e-5 as text
            return float(value)
        except ValueError:
            pass
    elif type(value).__name__ == kind and (not choices or value in choices):
        return value
    raise BadSetting(where, f"{value!r} does not fit ({kind})", "Run `vllm-lora train --help`.")


def _typed_list(where: str, value: Any, item: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """A YAML list, or a lone value, as the field's tuple."""
    parts = value if isinstance(value, list) else [value]
    choices: Sequence[str] = item.metadata.get("choices", ())
    if "float" in _kind(item) and all(type(part) in (int, float) for part in parts):
        return tuple(float(part) for part in parts)
    if "str" in _kind(item) and all(isinstance(part, str) for part in parts):
        wrong = [part for part in parts if choices and part not in choices]
        if not wrong:
            return tuple(parts)
        raise BadSetting(where, f"{wrong[0]!r} is none of {', '.join(choices)}", _nearest(wrong[0], choices))
    raise BadSetting(where, f"{value!r} does not fit ({_kind(item)})", "Run `vllm-lora train --help`.")


def _nearest(given: str, known: Sequence[str]) -> str:
    """The fix for a word that is not known: the one that was probably meant, or all of them."""
    close = difflib.get_close_matches(given, known, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(known)}."


def as_yaml(config: TrainConfig) -> str:
    """The settings as a file that `--config` takes back."""
    import yaml

    body = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    return str(yaml.safe_dump(body, sort_keys=False, allow_unicode=True))
