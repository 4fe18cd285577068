"""`vllm-lora serve --replicas N`: a fleet on Ray Serve, on this machine or on a cluster that is there."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

from serve.config import read_own_flags
from serve.launch import check_port, parse_with_vllm, prepare_environment
from serve.scaleout.settings import FleetSettings, read_fleet_settings
from serve.screen import screen
from vllm_lora_ext.errors import MissingPackage, ServerFailed
from vllm_lora_ext.sources import find_sources

DEFAULT_PORT = 8000
_OBJECT_STORE_BYTES = 256 << 20  # no request is that large, and none is kept


def main(argv: Sequence[str]) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        BadInput: with exit code 2, before any replica starts.
    """
    if importlib.util.find_spec("ray") is None:
        fix = "Install the extra: pip install 'vllm-lora[ray]'."
        raise MissingPackage("ray", "is not installed, and --replicas needs it", fix)
    settings = read_fleet_settings(argv)
    host, port = address_of(settings)
    if settings.ray_address is None:  # else the cluster's machines matter, not this one
        # On loopback: a cluster of one machine is nobody else's business. Read by Ray when vLLM imports it.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        find_sources(read_own_flags(settings.serve).adapters)
        prepare_environment()
        parse_with_vllm(settings.serve)  # what it refuses is told now, once, and not by a replica
        check_port(host, port, by_file=False)
    stopped = threading.Event()
    try:
        start(settings, host, port)
        for number in (signal.SIGTERM, signal.SIGINT):  # now: Ray sets its own when it starts
            signal.signal(number, lambda *_: stopped.set())
        screen().print(
            f"Ready: http://{host}:{port}/v1 with {settings.replicas} replicas. Ctrl+C stops them."
        )
        stopped.wait()
    finally:
        stop(settings)
    return 0


def start(settings: FleetSettings, host: str, port: int) -> None:
    """Bring the fleet up; returns once the first replicas answer."""
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve.scaleout.application import NAME, application

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # On a machine that is nearly full it would end Serve's own actors, which hold next to nothing.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    if not ray.is_initialized():
        ray.init(address=settings.ray_address, **({} if settings.ray_address else _local(settings)))
    serve.start(http_options=HTTPOptions(host=host, port=port))
    try:
        serve.run(application(settings), name=NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:
        fix = "The reason stands in the log above."
        raise ServerFailed("the fleet", "could not be started", fix) from error


def stop(settings: FleetSettings) -> None:
    """End the fleet: requests that run finish first. A cluster that was there before stays."""
    import ray
    from ray import serve

    from serve.scaleout.application import NAME

    if ray.is_initialized():
        serve.delete(NAME)  # waits for requests that run, with the proxy still there
        if settings.ray_address is None:
            serve.shutdown()
        ray.shutdown()


def _local(settings: FleetSettings) -> dict[str, Any]:
    """A cluster of this machine only; replicas share its cores, so Ray must not count them."""
    cpus = max(os.cpu_count() or 1, round(settings.max_replicas * settings.cpus))
    return {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "log_to_driver": True,
    }


def address_of(settings: FleetSettings) -> tuple[str, int]:
    """Where the fleet listens: the flags --host and --port of `vllm-lora serve`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    flags, _ = parser.parse_known_args(list(settings.serve))
    return flags.host, flags.port
