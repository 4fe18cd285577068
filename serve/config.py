"""What `vllm-lora serve` is told: our few flags beside all of vLLM's, and which of them were stated."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.flags import add_allow_flag, at_least
from serve.keys import Keys
from serve.scaleout.settings import add_fleet_flags
from vllm_lora_ext.catalog import KEEP_VERSIONS
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import BadSetting
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

TURN_SECONDS = 2.0
MAX_QUEUE, MAX_QUEUE_PER_ADAPTER = 1024, 256
METRICS_MAX_ADAPTERS = 1000
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class OwnFlags:
    """Our own flags, and the command line without them and without keys."""

    adapters: tuple[str, ...]
    passed_on: tuple[str, ...]
    unsafe_skip_compat: bool = False
    api_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class FrontSettings:
    """How the front side of the server behaves; counts are requests that wait."""

    keys: Keys
    allow_route: tuple[str, ...]
    turn_seconds: float
    preload: bool
    max_queue: int
    max_queue_per_adapter: int
    metrics_max_adapters: int
    require_proof: bool = False
    catalog_from_source: bool = False


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
    watch: bool
    chat: Mapping[str, ChatOverride]  # by the adapter's name
    stated: Mapping[str, Any]
    require_proof: bool = False
    catalog_from_source: bool = False

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
    group.add_argument(
        "--no-watch", action="store_true", help="take the folder's adapters at the start only, and no change"
    )
    group.add_argument(
        "--catalog-from-source",
        action="store_true",
        help="let the adapters folders alone decide what is served, as on each of many replicas: whoever "
        "wants to change an adapter over HTTP is answered with 409",
    )
    group.add_argument(
        "--prompt-template",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="the text form that an adapter was trained in, such as "
        r"'xiaoli=Human: {instruction}\n{input}\n\nAssistant: '; may be given several times",
    )
    group.add_argument("--strict", action="store_true", help="do not start when an adapter is refused")
    group.add_argument(
        "--require-proof",
        action="store_true",
        help="let no version go live that has not been proven to do on this engine what it did in training",
    )
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

    _add_front_flags(group)
    add_fleet_flags(parser.add_argument_group("vllm-lora: several replicas"))


def _add_front_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--admin-key",
        action="append",
        default=[],
        metavar="KEY",
        help="the key for publishing, removing and listing adapters (env VLLM_LORA_ADMIN_KEY); "
        "needed for changes on any host that is not this machine",
    )
    group.add_argument(
        "--allow-route",
        action="append",
        default=[],
        metavar="PATH",
        help="open a route of vLLM's that is closed; all that begin so with '*' at its end",
    )
    group.add_argument(
        "--preload",
        action="store_true",
        help="load adapters into spare memory while nothing is asked for, the last used first",
    )
    group.add_argument(
        "--turn-seconds",
        type=_seconds,
        default=TURN_SECONDS,
        metavar="S",
        help="the longest that an adapter keeps its slot while others wait for one; default: 2",
    )
    group.add_argument(
        "--max-queue", type=at_least(1), default=MAX_QUEUE, metavar="N", help="requests that may wait"
    )
    group.add_argument(
        "--max-queue-per-adapter", type=at_least(1), default=MAX_QUEUE_PER_ADAPTER, metavar="N"
    )
    group.add_argument(
        "--metrics-max-adapters",
        type=at_least(0),
        default=METRICS_MAX_ADAPTERS,
        metavar="N",
        help="adapters with metrics of their own; the others share the label `other`",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, is {text!r}") from None
    if not 0 < seconds < 3600:
        raise argparse.ArgumentTypeError(f"must be above 0 and below 3600, is {text}")
    return seconds


def front_settings(args: argparse.Namespace) -> FrontSettings:
    """The settings of the front side, also where only vLLM's own flags were parsed.

    Keys are taken out of `args` and the environment: vLLM would check them by itself, and log them.
    """
    api_keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY", "")]) if key]
    stated = getattr(args, "admin_key", None) or [os.environ.get("VLLM_LORA_ADMIN_KEY", "")]
    admin_keys = [key for key in stated if key]
    args.api_key = args.admin_key = None
    for name in ("VLLM_API_KEY", "VLLM_LORA_ADMIN_KEY"):
        os.environ.pop(name, None)
    is_here = bool(getattr(args, "uds", None)) or args.host in LOOPBACK
    return FrontSettings(
        keys=Keys(api_keys, admin_keys, loopback=is_here),
        allow_route=tuple(getattr(args, "allow_route", ())),
        preload=getattr(args, "preload", False),
        turn_seconds=getattr(args, "turn_seconds", TURN_SECONDS),
        max_queue=getattr(args, "max_queue", MAX_QUEUE),
        max_queue_per_adapter=getattr(args, "max_queue_per_adapter", MAX_QUEUE_PER_ADAPTER),
        metrics_max_adapters=getattr(args, "metrics_max_adapters", METRICS_MAX_ADAPTERS),
        require_proof=getattr(args, "require_proof", False),
        catalog_from_source=getattr(args, "catalog_from_source", False),
    )


def read_prompt_templates(values: Sequence[str]) -> dict[str, ChatOverride]:
    """The values of --prompt-template, by the adapter's name.

    Raises:
        BadSetting: one names no adapter.
    """
    chat = {}
    for value in values:
        name, separator, text = value.partition("=")
        if not name or not separator or "{" in name:
            fix = r"For example 'xiaoli=Human: {instruction}\n{input}\n\nAssistant: '."
            raise BadSetting(f"--prompt-template {value!r}", "must be NAME=TEXT, with an adapter's name", fix)
        chat[name] = ChatOverride(prompt_text=text)
    return chat


def read_own_flags(argv: Sequence[str]) -> OwnFlags:
    """Our flags alone, without vLLM, so that an absent folder is told at once."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_own_flags(parser)
    # vLLM's flag, which there counts once only when it is repeated.
    parser.add_argument("--api-key", action="extend", nargs="+", default=[])
    own, rest = parser.parse_known_args(list(argv))
    return OwnFlags(tuple(own.adapters), tuple(rest), own.unsafe_skip_compat, tuple(own.api_key))


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
        watch=not args.no_watch,
        chat=read_prompt_templates(args.prompt_template),
        stated={name: getattr(args, name) for name in INFERRED if getattr(args, name) is not unstated},
        require_proof=args.require_proof,
        catalog_from_source=args.catalog_from_source,
    )


def source_of(module: Any) -> AdapterSource:
    """One of vLLM's `LoRAModulePath`s, with every field that was stated."""
    fields = dataclasses.asdict(module)
    return stated_module(fields.pop("name"), fields.pop("path"), fields)
