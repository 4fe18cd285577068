"""What `vllm-lora serve` is told: our few flags beside all of vLLM's, and which of them were stated."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.flags import add_allow_flag, at_least
from vllm_lora_ext.catalog import KEEP_VERSIONS
from vllm_lora_ext.sources import AdapterSource, stated_module

# vLLM's settings that we infer when they are not stated.
INFERRED = (
    "host",
    "served_model_name",
    "enable_lora",
    "max_lora_rank",
    "max_loras",
    "max_cpu_loras",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "enforce_eager",
)


@dataclass(frozen=True)
class OwnFlags:
    """Our own flags, and the command line without them."""

    adapters: tuple[str, ...]
    passed_on: tuple[str, ...]
    unsafe_skip_compat: bool = False


@dataclass(frozen=True)
class ServeConfig:
    """`stated`: what the user stated of `INFERRED`. `base_model` is None when the adapters have to tell."""

    adapters: tuple[str, ...]
    modules: tuple[AdapterSource, ...]
    base_model: str | None
    strict: bool
    state_dir: Path | None
    keep_versions: int
    allow: frozenset[str]
    stated: Mapping[str, Any]

    @property
    def base_names(self) -> tuple[str, ...]:
        """The names that the user states for the base with --served-model-name."""
        names = self.stated.get("served_model_name") or ()
        return (names,) if isinstance(names, str) else tuple(names)

    @property
    def wants_adapters(self) -> bool:
        """Whether LoRA is asked for at all; without it this is a plain vLLM server."""
        return bool(self.adapters or self.modules or self.state_dir or self.stated.get("enable_lora"))


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Our flags; every other one is vLLM's."""
    group = parser.add_argument_group("vllm-lora")
    group.add_argument(
        "--adapters",
        action="append",
        default=[],
        metavar="DIR|NAME=PATH",
        help="folder of adapters, one adapter, or name=path; may be given several times",
    )
    group.add_argument(
        "--base-model", metavar="DIR_OR_HUB_ID", help="default: the one that the adapters name"
    )
    group.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="where checked versions and the state are kept; default: one per adapters folder, under "
        "$XDG_STATE_HOME/vllm-lora",
    )
    group.add_argument(
        "--keep-versions",
        type=at_least(1),
        default=KEEP_VERSIONS,
        metavar="N",
        help="per adapter; default: 10",
    )
    add_allow_flag(group)
    group.add_argument("--strict", action="store_true", help="do not start when an adapter is refused")
    group.add_argument(
        "--no-isolation-check",
        action="store_true",
        help="skip the check at the start that no request sees another's adapter (under 2 s)",
    )
    group.add_argument(
        "--unsafe-skip-compat",
        action="store_true",
        help="serve with a vLLM that lacks what keeps adapters apart and the engine alive",
    )


def read_own_flags(argv: Sequence[str]) -> OwnFlags:
    """Our flags alone, without vLLM, so that an absent folder is told at once."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_own_flags(parser)
    own, rest = parser.parse_known_args(list(argv))
    return OwnFlags(tuple(own.adapters), tuple(rest), own.unsafe_skip_compat)


def read_config(args: argparse.Namespace, unstated: object) -> ServeConfig:
    """The config from vLLM's parsed arguments; `unstated` marks what neither flag nor file set."""
    base = args.base_model or args.model_tag or (args.model if args.model is not unstated else None)
    return ServeConfig(
        adapters=tuple(args.adapters),
        modules=tuple(map(source_of, args.lora_modules or ())),
        base_model=base,
        strict=args.strict,
        state_dir=args.state_dir,
        keep_versions=args.keep_versions,
        allow=frozenset(args.allow),
        stated={name: getattr(args, name) for name in INFERRED if getattr(args, name) is not unstated},
    )


def source_of(module: Any) -> AdapterSource:
    """One of vLLM's `LoRAModulePath`s, with every field that was stated."""
    fields = dataclasses.asdict(module)
    return stated_module(fields.pop("name"), fields.pop("path"), fields)
