"""`vllm-lora serve`: adapters folder -> vLLM arguments -> running server."""

from __future__ import annotations

import argparse
import importlib.util
import os
import socket
from collections.abc import Sequence
from importlib.metadata import entry_points

from serve.config import INFERRED, OwnFlags, ServeConfig, add_own_flags, read_config, read_own_flags
from serve.fleet import (
    AdapterSource,
    agreed_base_model,
    find_sources,
    fleet_table,
    inspect_fleet,
)
from serve.plan import flag_of, infer_adapters, infer_kv_cache, infer_server, plain_command
from serve.screen import screen
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import AdapterRefused, BadSetting, MissingPackage, PortInUse
from vllm_lora_ext.spec import EngineLimits

PLUGIN_NAME = "vllm_lora"
_PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)
_FEW_CORES = 4  # below this, a core kept free for the API server costs more than it brings


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        BadInput: with exit code 2, before the engine starts.
    """
    require_vllm()
    own = read_own_flags(argv)
    find_sources(own.adapters)
    prepare_environment()
    args = parse_with_vllm(argv)
    config = read_config(args, _UNSTATED)
    apply_plan(config, args, own)
    return run_server(args)


def require_vllm() -> None:
    """Raises MissingPackage with the command that installs vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise MissingPackage(
            "vllm",
            "is not installed, and serving needs it",
            "Run `make setup`, or see the install section of the README; `vllm-lora env` tells more.",
        )


def prepare_environment() -> None:
    """Settings that vLLM reads from the environment, before it is imported.

    `VLLM_PLUGINS` is an allow-list once it is set: our name is added, and when
    it was not set, so is everything that loads without it. Nothing that the
    user set is changed.
    """
    stated = os.environ.get("VLLM_PLUGINS")
    if stated is None:
        names = {entry.name for group in _PLUGIN_GROUPS for entry in entry_points(group=group)}
    else:
        names = {name for name in stated.split(",") if name}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(names | {PLUGIN_NAME}))
    if (os.cpu_count() or 1) <= _FEW_CORES:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    # vLLM starts helpers with `python -m`, which would look for modules in the
    # working folder first, and find a user's serve.py there.
    os.environ.setdefault("PYTHONSAFEPATH", "1")


class _Unstated:
    """Marks a setting that nobody stated; a class, so that it survives printing."""

    def __repr__(self) -> str:
        return "not stated"


_UNSTATED = _Unstated()


def parse_with_vllm(argv: Sequence[str]) -> argparse.Namespace:
    """All flags by vLLM's own parser, so that every flag of `vllm serve` means what it means there."""
    from vllm_lora_ext.engine import compat

    compat.check(compat.SYMBOLS)
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-lora serve")
    add_own_flags(parser)
    make_arg_parser(parser)
    marked = argparse.Namespace(**dict.fromkeys((*INFERRED, "model"), _UNSTATED))
    args: argparse.Namespace = parser.parse_args(list(argv), namespace=marked)
    return args


def apply_plan(config: ServeConfig, args: argparse.Namespace, own: OwnFlags) -> None:
    """Judge the fleet, infer what is not stated, and write both into vLLM's arguments.

    Raises:
        BadSetting, BadBaseModel, PortInUse: before anything has started.
        AdapterRefused: with --strict, when any adapter is refused.
    """
    out = screen()
    if config.wants_adapters and config.stated.get("enable_lora") is False:
        raise BadSetting("--no-enable-lora", "adapters were given as well", "Remove one of the two.")
    sources = find_sources(config.adapters, config.modules)
    base = read_base_model(config.base_model or agreed_base_model(sources))
    limits = EngineLimits(int(config.stated.get("max_lora_rank", EngineLimits().max_lora_rank)))
    inspections = inspect_fleet(sources, base, limits)
    if inspections:
        out.print(fleet_table(inspections))
    for item in inspections:
        if config.strict and not item.admitted:
            raise AdapterRefused(item.name, item.findings)
    if config.adapters and not sources:
        out.print(f"warning: no adapter in {', '.join(config.adapters)}; serving the base model alone")
    admitted = {item.name: item for item in inspections if item.admitted}
    remote = [source for source in sources if not source.is_local]
    inferred = infer_server(base.public_name, config.stated)
    if config.wants_adapters:
        specs = [item.spec for item in admitted.values() if item.spec]
        inferred += infer_adapters(specs, len(remote), config.stated)
    if (free := free_memory_of_cpu_platform()) is not None:
        inferred += infer_kv_cache(free, config.stated)
    for value in inferred:
        setattr(args, value.name, value.value)
        out.print(f"{flag_of(value)}: {value.reason}")
    local = [AdapterSource(item.name, str(item.path.resolve())) for item in admitted.values()]
    modules = [*local, *remote]
    finish_arguments(args, base.name, modules)
    check_port(str(args.host or ""), args.port, bool(args.uds))
    pairs = [(module.name, module.path) for module in modules]
    out.print("as plain vLLM:", plain_command(base.name, inferred, pairs, _vllm_words(own, config)))


def free_memory_of_cpu_platform() -> int | None:
    """Bytes free for a server on the CPU; None on another device, or where the user has set the KV cache."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    import psutil

    return int(psutil.virtual_memory().available)


def finish_arguments(args: argparse.Namespace, base_model: str, modules: Sequence[AdapterSource]) -> None:
    """Put base and adapters where vLLM expects them, and defaults where nothing was stated or inferred."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    defaults = vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))
    for name, value in vars(args).items():
        if value is _UNSTATED:
            setattr(args, name, defaults[name])
    args.model = args.model_tag = base_model
    args.lora_modules = [LoRAModulePath(module.name, module.path) for module in modules] or None


def check_port(host: str, port: int, by_file: bool) -> None:
    """Say that the port is taken now, not after the engine has loaded.

    Raises:
        PortInUse: somebody listens there.
    """
    if by_file or not port:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"{host or 'any address'} port {port}",
                f"cannot be listened on ({error.strerror})",
                "Stop the program that uses it, or choose another --port.",
            ) from error


def run_server(args: argparse.Namespace) -> int:
    """Hand over to vLLM's own `serve`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)
    return 0


def _vllm_words(own: OwnFlags, config: ServeConfig) -> list[str]:
    """The user's words that are vLLM's, without the base model and the adapters, which stand elsewhere."""
    words = list(own.passed_on)
    if config.base_model in words[:1]:
        words = words[1:]
    if "--lora-modules" in words:
        start = words.index("--lora-modules")
        stop = start + 1
        while stop < len(words) and not words[stop].startswith("-"):
            stop += 1
        words = words[:start] + words[stop:]
    return words
