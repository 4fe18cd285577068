"""Settings as they stand in a YAML file, each of the type that `TrainConfig` wants."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from vllm_lora_ext.errors import BadSetting


class Body(dict[Any, Any]):
    """A mapping as it stands in a file. `again` are keys that stand there once more, with their values,
    which YAML would let win in silence."""

    again: list[tuple[Any, Any]]


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a file that `--config` names.

    Raises:
        BadSetting: the file cannot be read, a key is unknown or stands there twice, or a value has the
            wrong type.
    """
    return typed_settings(read_body(path), str(path))


def read_body(path: Path) -> Body:
    """The file as it stands.

    Raises:
        BadSetting: it cannot be read, or holds something else than `key: value`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """With every mapping as a `Body`."""

    def mapping(loader: Loader, node: Any) -> Body:
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        again = [
            (key, loader.construct_object(value, deep=True))
            for number, (key, (_, value)) in enumerate(zip(keys, node.value, strict=True))
            if key in keys[:number]
        ]
        loader.flatten_mapping(node)
        body = Body(loader.construct_mapping(node, deep=True))
        body.again = again
        return body

    Loader.add_constructor("tag:yaml.org,2002:map", mapping)
    try:
        body = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BadSetting(str(path), f"cannot be read as YAML ({error})", "Check the file.") from error
    if not isinstance(body, Body):
        raise BadSetting(str(path), "must hold settings as `key: value`", "See examples/classic.yaml.")
    return body


def typed_settings(body: Body, where: str) -> dict[str, Any]:
    """Keys and values as `TrainConfig` takes them; `where` is told in errors.

    Raises:
        BadSetting: a key is unknown or stands there twice, or a value has the wrong type.
    """
    for key, _ in body.again:
        raise BadSetting(f"{where}: {key}", "stands there twice", "Leave one of them out.")
    known = {item.name: item for item in fields(TrainConfig)}
    values = {}
    for raw_key, value in body.items():
        key = str(raw_key).replace("-", "_")
        if key not in known:
            raise BadSetting(f"{where}: {raw_key}", "is no setting", nearest(key, sorted(known)))
        values[key] = _typed(f"{where}: {raw_key}", value, known[key])
    return values


def kind_of(item: dataclasses.Field[Any]) -> str:
    """The field's type as it is written, without the `None` of an open default."""
    return str(item.type).removesuffix(" | None")


def _typed(where: str, value: Any, item: dataclasses.Field[Any]) -> Any:
    """A YAML value as the field's type; a lone string where several may stand is one of them."""
    kind = kind_of(item)
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
    if "float" in kind_of(item) and all(type(part) in (int, float) for part in parts):
        return tuple(float(part) for part in parts)
    if "str" in kind_of(item) and all(isinstance(part, str) for part in parts):
        wrong = [part for part in parts if choices and part not in choices]
        if not wrong:
            return tuple(parts)
        raise BadSetting(where, f"{wrong[0]!r} is none of {', '.join(choices)}", nearest(wrong[0], choices))
    raise BadSetting(where, f"{value!r} does not fit ({kind_of(item)})", "Run `vllm-lora train --help`.")


def nearest(given: str, known: Sequence[str]) -> str:
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
