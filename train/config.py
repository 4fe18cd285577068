"""What a training run is told: one frozen `TrainConfig`, from flags and a YAML file.

Each default stands here once, and the command line reads it from here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.spec import ALLOWED_MAX_LORA_RANKS

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _flag(help_text: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A field whose flag, type and help come from one place."""
    metadata = {"help": help_text, **options}
    return (
        field(metadata=metadata)
        if default is dataclasses.MISSING
        else field(default=default, metadata=metadata)
    )


def default_learning_rate(hidden_size: int) -> float:
    """A peak rate for a base of this width: wider models want smaller steps (docs/decisions.md)."""
    return min(2e-3, 1 / hidden_size)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the names are those of transformers and TRL."""

    base_model: str = _flag("folder or hub id of the base model", metavar="DIR_OR_HUB_ID")
    data: tuple[str, ...] = _flag("JSON file of rows", nargs="+", metavar="FILE")
    name: str = _flag("name of the adapter: what clients send as `model`")
    output_dir: str = _flag("folder of adapters; the new one becomes DIR/NAME", metavar="DIR")
    overwrite: bool = _flag("replace an adapter of that name, if this tool wrote it", False)
    prompt_template: str = _flag(
        "`chat`: the model's own chat template; `classic`: Human/Assistant text; "
        "or a text with {instruction} and {input}",
        "chat",
    )
    num_train_epochs: float = _flag("passes over the rows", 20.0)
    max_steps: int = _flag("stop after so many steps; -1: by epochs", -1)
    per_device_train_batch_size: int = _flag("rows per step", 4)
    gradient_accumulation_steps: int = _flag("batches per optimizer step", 1)
    learning_rate: float | None = _flag(
        "peak learning rate of AdamW (default: 1 / hidden size of the base, at most 2e-3)", None
    )
    lr_scheduler_type: str = _flag(
        "linear, cosine or constant", "cosine", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = _flag("share of the steps that warm up", 0.05)
    weight_decay: float = _flag("weight decay of AdamW", 0.0)
    max_grad_norm: float = _flag("gradient clipping", 1.0)
    max_length: int = _flag("longest row in tokens; a longer one is left out", 256)
    validation_split: float = _flag("share of the rows held out for evaluation", 0.1)
    lora_r: int = _flag("rank", 16)
    lora_alpha: float = _flag("alpha; the update is scaled by alpha / rank", 32.0)
    lora_dropout: float = _flag("dropout on the adapter's input", 0.0)
    target_modules: tuple[str, ...] = _flag(
        "modules that get an adapter", ALL_PROJECTIONS, nargs="+", metavar="MODULE"
    )
    dtype: str = _flag(
        "auto: bf16 on a GPU that has it, else fp16; fp32 on the CPU",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    seed: int = _flag("seed of the split, the order and the initial weights", 42)
    logging_steps: int = _flag("steps between two lines of loss and token accuracy", 20)

    def __post_init__(self) -> None:
        rules = {
            "num_train_epochs": 0 < self.num_train_epochs < 1e6,
            "max_steps": self.max_steps == -1 or self.max_steps >= 1,
            "per_device_train_batch_size": self.per_device_train_batch_size >= 1,
            "gradient_accumulation_steps": self.gradient_accumulation_steps >= 1,
            "learning_rate": self.learning_rate is None or 0 < self.learning_rate < 1,
            "warmup_ratio": 0 <= self.warmup_ratio < 1,
            "max_length": self.max_length >= 2,
            "validation_split": 0 <= self.validation_split < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "max_grad_norm": 0 < self.max_grad_norm < math.inf,
            "lora_r": 1 <= self.lora_r <= ALLOWED_MAX_LORA_RANKS[-1],
            "lora_alpha": 0 < self.lora_alpha < math.inf,
            "lora_dropout": 0 <= self.lora_dropout < 1,
            "logging_steps": self.logging_steps >= 1,
            "seed": 0 <= self.seed < 2**32,  # what numpy takes
            "target_modules": bool(self.target_modules),
        }
        for key, holds in rules.items():
            if not holds:
                raise BadSetting(
                    f"--{key.replace('_', '-')}",
                    f"{getattr(self, key)!r} is out of range",
                    "Run `vllm-lora train --help` for what it means.",
                )
        for finding in judge_name(self.name):
            raise BadSetting(f"--name {finding.item}", finding.rule, "Choose another --name.")

    @property
    def base_path(self) -> str:
        """The base as it is noted in the adapter: a hub id, or a folder's full path, good from anywhere."""
        folder = Path(self.base_model)
        return str(folder.resolve()) if folder.is_dir() else self.base_model

    @property
    def adapter_dir(self) -> Path:
        """Where the finished adapter will stand."""
        return Path(self.output_dir) / self.name


def planned_steps(num_rows: int, config: TrainConfig) -> int:
    """Optimizer steps of a run: rows x epochs / batch, rounded up within each epoch."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-num_rows // config.per_device_train_batch_size)
    per_epoch = -(-batches // config.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * config.num_train_epochs))


def parse_config(argv: Sequence[str]) -> TrainConfig:
    """Flags over the YAML file named by `--config`, over the defaults.

    Raises:
        BadSetting: the file cannot be read, a key is unknown, or a value has the wrong type.
        SystemExit: argparse refused the flags (exit code 2), or `--help`.
    """
    known = fields(TrainConfig)
    parser = argparse.ArgumentParser(
        prog="vllm-lora train",
        description="Train a LoRA adapter on rows of instruction, input and output.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings from a file; flags win")
    for item in known:
        _add_flag(parser, item)
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    values = {**(_read_yaml(Path(path)) if path else {}), **given}
    missing = [
        f"--{item.name.replace('_', '-')}"
        for item in known
        if item.default is dataclasses.MISSING and item.name not in values
    ]
    if missing:
        parser.error(f"these are needed, as flags or in --config: {', '.join(missing)}")
    return TrainConfig(**values)


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any]) -> None:
    options: dict[str, Any] = dict(item.metadata)
    text = options["help"]
    if item.default not in (dataclasses.MISSING, False, None):
        shown = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        text += f" (default: {shown})"
    options["help"] = text
    if item.type == "bool":
        options["action"] = argparse.BooleanOptionalAction
    else:
        options["type"] = {"int": int, "float": float}.get(_kind(item), str)
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
            close = ", ".join(sorted(known))
            raise BadSetting(f"{path}: {raw_key}", "is no setting", f"The settings are: {close}.")
        values[key] = _typed(f"{path}: {raw_key}", value, known[key])
    return values


def _typed(where: str, value: Any, item: dataclasses.Field[Any]) -> Any:
    """A YAML value as the field's type; a lone string where several may stand is one of them."""
    kind = _kind(item)
    if kind.startswith("tuple"):
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            return tuple(value)
        if isinstance(value, str):
            return (value,)
    elif kind == "float" and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 5e-5 as text
            return float(value)
        except ValueError:
            pass
    elif type(value).__name__ == kind:
        choices = item.metadata.get("choices")
        if not choices or value in choices:
            return value
    raise BadSetting(where, f"{value!r} does not fit ({kind})", "Run `vllm-lora train --help`.")
