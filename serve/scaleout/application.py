"""The three deployments of a fleet, as one application of Ray Serve: gateway, replicas, controller."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import LoggingConfig

from serve.scaleout.controller import Controller
from serve.scaleout.gateway import Gateway
from serve.scaleout.replica import Replica
from serve.scaleout.router import AffinityRouter
from serve.scaleout.settings import CONTROLLER, ENGINE, GATEWAY, FleetSettings

NAME = "vllm-lora"
# A replica's own queue answers 429 long before; Ray's would only hold requests where nobody counts them.
_MOST_ONGOING = 4096
_QUIET = LoggingConfig(enable_access_log=False)  # the servers log requests; reports come twice a second
_HEAD_NODE = "node:__internal_head__"  # Ray gives it this resource
_DRAIN_S = 120.0
_SCALE_OUT_AFTER_S = 10.0
_HEALTH_PERIOD_S, _HEALTH_TIMEOUT_S = 0.5, 30.0  # by the first Ray notices the end of an actor


def application(settings: FleetSettings) -> Application:
    """What `serve.run` runs."""
    small: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": 0},
        "max_ongoing_requests": _MOST_ONGOING,
        "logging_config": _QUIET,
    }
    alone = {**small, "health_check_period_s": _HEALTH_PERIOD_S}
    if settings.replica_state_dir is not None:  # what it keeps is on that node, and nowhere else
        alone["ray_actor_options"] = {"num_cpus": 0, "resources": {_HEAD_NODE: 0.001}}
    controller = serve.deployment(Controller, name=CONTROLLER, **alone).bind(settings)
    engine = serve.deployment(Replica, name=ENGINE, **engine_options(settings)).bind(settings, controller)
    return serve.deployment(Gateway, name=GATEWAY, **small).bind(settings, controller, engine)


def engine_options(settings: FleetSettings) -> dict[str, Any]:
    """Placement, scaling, draining and routing of the replicas, all of it Ray's."""
    options: dict[str, Any] = {
        "ray_actor_options": {"num_cpus": settings.cpus, "num_gpus": settings.gpus},
        "max_ongoing_requests": _MOST_ONGOING,
        "logging_config": _QUIET,
        "graceful_shutdown_timeout_s": _DRAIN_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": _HEALTH_TIMEOUT_S,
        "request_router_config": RequestRouterConfig(
            request_router_class=AffinityRouter,
            request_router_kwargs={
                "most": settings.most,
                "calm": max(1, settings.ongoing // 2),
                "policy": settings.policy,
            },
        ),
    }
    if not settings.scales:
        return {**options, "num_replicas": settings.replicas}
    scaling = {
        "min_replicas": settings.replicas,
        "max_replicas": settings.max_replicas,
        "target_ongoing_requests": settings.ongoing,
        "upscale_delay_s": _SCALE_OUT_AFTER_S,
        "downscale_delay_s": settings.scale_in_after_s,
    }
    return {**options, "autoscaling_config": scaling}
