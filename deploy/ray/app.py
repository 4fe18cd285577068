"""The fleet of `vllm-lora serve --replicas`, for `serve run` and KubeRay.

    serve run deploy.ray.app:app flags="--adapters /adapters --state-dir /state --base-model /base" replicas=2

The same settings may come from the environment: VLLM_LORA_FLAGS, which are flags of `vllm-lora serve` and of
its fleet, see `vllm-lora serve --help`. The state folder has to be one that all nodes share, unless
`--replica-state-dir` gives each replica a copy on its own node.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from serve.scaleout.settings import read_fleet_settings

if TYPE_CHECKING:
    from ray.serve import Application

DEFAULT_FLAGS = "--adapters /adapters --base-model /base --state-dir /state --host 0.0.0.0"


def app(args: dict[str, str]) -> Application:
    """Ray Serve's application builder; `args` are `flags`, `replicas` and `max_replicas`."""
    from serve.scaleout.application import application

    flags = shlex.split(args.get("flags") or os.environ.get("VLLM_LORA_FLAGS") or DEFAULT_FLAGS)
    for name in ("replicas", "max_replicas"):
        if name in args:
            flags += [f"--{name.replace('_', '-')}", str(args[name])]
    return application(read_fleet_settings(flags))
