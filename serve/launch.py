"""`vllm-lora serve`: adapters folder -> vLLM arguments -> running server."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import importlib.util
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from serve.config import (
    INFERRED,
    OwnFlags,
    ServeConfig,
    add_own_flags,
    front_settings,
    read_config,
    read_own_flags,
)
from serve.fleet import (
    FleetRow,
    agreed_base_model,
    default_state_dir,
    fleet_rows,
    fleet_table,
)
from serve.from_source import must_follow_source
from serve.plan import (
    Inferred,
    flag_of,
    infer_adapters,
    infer_compilation,
    infer_kv_cache,
    infer_server,
    plain_command,
)
from serve.proof_gate import ProofGate
from serve.ready_watch import ReadyWatch
from serve.scaleout.settings import wants_fleet
from serve.screen import screen
from serve.taking import taking
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.engine import compat, native
from vllm_lora_ext.errors import AdapterRefused, BadSetting, MissingPackage, PortInUse, ServerFailed
from vllm_lora_ext.free_memory import free_memory
from vllm_lora_ext.inbox import Condition, Inbox, Item
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.sources import AdapterSource, find_sources, name_and_place
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
    if wants_fleet(argv):
        fleet: Callable[[Sequence[str]], int] = importlib.import_module("serve.scaleout.launch").main
        return fleet(argv)
    own = read_own_flags(argv)
    find_sources(own.adapters)
    prepare_environment()
    if own.unsafe_skip_compat:
        os.environ[compat.SKIP_VARIABLE] = "1"
    args, defaults = parse_with_vllm(argv)
    config = read_config(args, UNSTATED)
    if own.api_keys:
        args.api_key = list(own.api_keys)
    with ExitStack() as held:
        apply_plan(config, args, defaults, own, held)
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
    if usable_cores() <= _FEW_CORES:
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    # vLLM starts helpers with `python -m`, which would look for modules in the
    # working folder first, and find a user's serve.py there.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    # A process that is forked while a thread of ours works could inherit a lock that nobody opens again.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def usable_cores() -> int:
    """The cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Unstated:
    """Marks a setting that nobody stated; a class, so that it survives printing."""

    def __repr__(self) -> str:
        return "not stated"


UNSTATED = _Unstated()


def parse_with_vllm(argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """All flags by vLLM's own parser, so that every flag of `vllm serve` means what it means there.

    Also gives vLLM's defaults for what nobody stated.

    Raises:
        BadSetting: the --config file cannot be read.
        SystemExit: the parser refused a flag (exit code 2), or `--help`.
    """
    for warning in compat.usable_features("any", names=("serve",)).warnings:
        screen().print(f"warning: {warning}")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-lora serve")
    add_own_flags(parser)
    make_arg_parser(parser)
    marked = (*INFERRED, "model")
    namespace = argparse.Namespace(**dict.fromkeys(marked, UNSTATED))
    try:
        args: argparse.Namespace = parser.parse_args(list(argv), namespace=namespace)
    except (OSError, ValueError, AssertionError) as error:
        raise BadSetting("the command line", str(error).rstrip("."), "See --help.") from error
    return args, {name: parser.get_default(name) for name in marked}


def apply_plan(
    config: ServeConfig, args: argparse.Namespace, defaults: dict[str, Any], own: OwnFlags, held: ExitStack
) -> None:
    """Judge the fleet, infer what is not stated, and write both into vLLM's arguments.

    `held` keeps what works beside the server: the catalog, and the taking of what is new.

    Raises:
        BadSetting, BadBaseModel, PortInUse, StateLocked: before anything has started.
        AdapterRefused: with --strict, when any adapter is refused.
    """
    out = screen()
    if config.wants_adapters and config.stated.get("enable_lora") is False:
        raise BadSetting("--no-enable-lora", "adapters were given as well", "Remove one of the two.")
    check_port(str(args.host if "host" in config.stated else ""), args.port, bool(args.uds))
    sources = [*find_sources(config.adapters), *config.modules]
    catalog = held.enter_context(open_catalog(config)) if config.wants_adapters else None
    remembered = catalog.base().get("name") if catalog else None
    base = read_base_model(config.base_model or agreed_base_model(sources, remembered))
    inferred = infer_server(base.public_name, config.stated)
    rows = list[FleetRow]()
    if catalog is not None:
        condition = None
        if config.require_proof:
            args.vllm_lora_proofs = gate = ProofGate()
            condition = Condition(proof_mark(args), gate.check)
        inbox, items, rows = admit_fleet(sources, base, config, catalog, condition)
        served_rows = [row for row in rows if not row.is_refused]
        ranks, sizes = [row.rank for row in served_rows], [row.size_bytes for row in served_rows]
        inferred += infer_adapters(ranks, sizes, free_memory(), config.stated)
        args.vllm_lora_catalog = catalog
        args.vllm_lora_roots = places_of(config)
        args.vllm_lora_folders = held.enter_context(taking(inbox, items, config))
        if config.require_proof:
            held.callback(gate.close)  # before the taking ends, which may wait there
    inferred += infer_on_cpu(base.name, config.stated)
    for value in inferred:
        out.print(f"{flag_of(value)}: {value.reason}")
    values = {item.name: item.value for item in inferred}
    for name, default in defaults.items():
        if getattr(args, name) is UNSTATED:
            setattr(args, name, values.get(name, default))
    args.model = args.model_tag = base.name
    args.lora_modules = None  # they are served from the catalog
    args.api_server_count = one_api_server(args.api_server_count)
    args.vllm_lora_front = front_settings(args)
    if catalog is not None and not args.uds:
        catalog.note_url(url_of(args))
    served = {row.name for row in rows if not row.is_refused}
    pairs = [(source.name, source.path) for source in sources if source.name in served]
    out.print(
        "as plain vLLM:",
        plain_command(base.name, inferred, pairs, vllm_words(own.passed_on, config.base_model)),
    )


def open_catalog(config: ServeConfig) -> Catalog:
    """The catalog of the folders that are served, locked against a second server; says where it is."""
    places = [name_and_place(value)[1] for value in config.adapters]
    places += [source.path for source in config.modules]
    state_dir = (config.state_dir or default_state_dir(places)).absolute()
    catalog = Catalog(state_dir, keep_versions=config.keep_versions)
    screen().print(f"--state-dir {state_dir}: checked versions of the adapters, and the state")
    if config.catalog_from_source:
        must_follow_source(config, catalog)
    return catalog


def admit_fleet(
    sources: Sequence[AdapterSource],
    base: BaseModel,
    config: ServeConfig,
    catalog: Catalog,
    condition: Condition | None = None,
) -> tuple[Inbox, list[Item], list[FleetRow]]:
    """Look at every adapter, show the table, and take what replaces something that is served.

    Gives what is new, to be taken beside the engine's start, and the table's rows.

    Raises:
        AdapterRefused: with --strict, when any adapter is refused.
    """
    base_names = config.base_names or (base.public_name,)
    rules = Rules(base, base_names, allow=config.allow)
    limits = EngineLimits(int(config.stated.get("max_lora_rank", EngineLimits().max_lora_rank)))
    inbox = Inbox(catalog, rules, config.chat, condition)
    items = inbox.scan(sources, retire=bool(config.adapters or config.modules))
    catalog.note_base(base.name, base.fingerprint)
    if unknown := set(config.chat) - {source.name for source in sources}:
        listed = ", ".join(sorted(unknown))
        screen().print(f"warning: --prompt-template for {listed}: there is no adapter of that name yet")
    served = set(catalog.names())
    # A name is served in one version from the start, so what changes one is taken now; what has to be proved
    # first is not, since nothing can be before the engine runs.
    can_be = condition is None or not condition.waits
    now = [item for item in items if can_be and (config.strict or item.source.name in served)]
    inbox.take_all(now)
    items = inbox.scan(sources, retire=False) if any(item.is_pending for item in now) else items
    rows = fleet_rows(items, catalog, dataclasses.replace(rules, limits=limits))
    if rows:
        screen().print(fleet_table(rows))
    elif config.adapters:
        screen().print(f"warning: no adapter in {', '.join(config.adapters)}; only the base is served")
    for row in rows:
        if config.strict and row.is_refused:
            raise AdapterRefused(row.name, row.findings)
    return inbox, items, rows


def proof_mark(args: argparse.Namespace) -> str:
    """Under which conditions a refusal for want of a proof is the last word."""
    import vllm

    return f"require-proof {vllm.__version__} {args.dtype}"


def places_of(config: ServeConfig) -> list[Path]:
    """The folders of adapters, within which a client with the admin key may name one."""
    places = [Path(name_and_place(value)[1]) for value in config.adapters if "://" not in value]
    return places + [source.folder.parent for source in config.modules if source.folder is not None]


def one_api_server(stated: int | None) -> int:
    """Raises BadSetting for more: one process has to own what is loaded."""
    if stated is not None and stated > 1:
        fix = "Leave --api-server-count out."
        raise BadSetting(f"--api-server-count {stated}", "one API server owns what is loaded", fix)
    return 1


def url_of(args: argparse.Namespace) -> str:
    """Where this machine reaches the server."""
    host = "127.0.0.1" if args.host in (None, "", "0.0.0.0", "::") else args.host
    scheme = "https" if args.ssl_certfile else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{args.port}"


def infer_on_cpu(base_model: str, stated: Mapping[str, Any]) -> list[Inferred]:
    """Memory and compilation of a server on the CPU; nothing on another device.

    Memory that VLLM_CPU_KVCACHE_SPACE states is not stated again.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    inferred = infer_compilation(_weights_size(base_model), native.compiler() is not None, stated)
    if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        inferred += infer_kv_cache(free_memory(), stated)
    return inferred


def _weights_size(base_model: str) -> int | None:
    """Bytes of the base's safetensors files; None for a base that is no local folder."""
    sizes = [file.stat().st_size for file in Path(base_model).glob("*.safetensors")]
    return sum(sizes) or None


def check_port(host: str, port: int, by_file: bool) -> None:
    """Say that the port is taken now, not after the engine has loaded.

    Raises:
        PortInUse: somebody listens there.
        BadSetting: there is no such port or address.
    """
    if by_file or port == 0:
        return
    if not 0 < port < 1 << 16:
        raise BadSetting(f"--port {port}", "must be 0 to 65535", "Choose another.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host or "127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                fix = "Stop the program that uses it, or choose another --port."
                raise PortInUse(f"{host or 'any address'} port {port}", "is in use", fix) from error
            rule = f"cannot be listened on ({error.strerror})"
            raise BadSetting(f"--host {host} --port {port}", rule, "Choose another.") from error


def run_server(args: argparse.Namespace) -> int:
    """Hand over to vLLM's own `serve`.

    Raises:
        ServerFailed: the engine died while it served.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand

    command = ServeSubcommand()
    command.validate(args)
    watch = ReadyWatch(args)
    watch.start()
    command.cmd(args)
    if watch.never_ready:
        rule = "runs without our endpoint, so nothing guards its adapters"
        raise ServerFailed("the server", rule, "The reason stands in the log above.")
    if getattr(args, "engine_died", False):
        raise ServerFailed("the engine", "died while it served", "Its last words stand above.")
    return 0


def vllm_words(words: Sequence[str], base_model: str | None) -> list[str]:
    """The user's words that are vLLM's, without base model and adapters, which stand elsewhere."""
    kept: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        flag = word.partition("=")[0].replace("_", "-")
        position += 1
        if flag in ("--model", "--lora-modules"):
            if "=" not in word:  # its values follow
                while position < len(words) and not words[position].startswith("-"):
                    position += 1
        elif word != base_model:
            kept.append(word)
    return kept
