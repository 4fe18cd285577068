"""How a fleet is told to Ray Serve: numbers, scaling, draining, and the file that KubeRay names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vllm-lora[ray]'")

from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app

from deploy.ray.app import app
from serve.scaleout.application import application, engine_options
from serve.scaleout.settings import read_fleet_settings

SETTINGS = read_fleet_settings(["base", "--adapters", "a", "--replicas", "2", "--ongoing-per-replica", "6"])


def built(application: Any) -> dict[str, Any]:
    deployments = build_app(application, name="fleet", default_runtime_env={}).deployments
    return {deployment.name: deployment for deployment in deployments}


def test_a_fleet_is_a_gateway_replicas_and_one_controller() -> None:
    deployments = built(application(SETTINGS))
    assert set(deployments) == {"gateway", "engine", "controller"}
    assert deployments["controller"].num_replicas == 1
    assert deployments["engine"].num_replicas == 2


def test_ray_scales_by_ongoing_requests_and_waits_for_them() -> None:
    options = engine_options(replace(SETTINGS, max_replicas=5))
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (2, 5)
    assert scaling["target_ongoing_requests"] == 6
    assert "num_replicas" not in options
    assert options["graceful_shutdown_timeout_s"] >= 60
    assert options["request_router_config"].request_router_kwargs["calm"] == 3


@pytest.mark.parametrize("args", [{}, {"flags": "--adapters x --base-model y", "replicas": "3"}])
def test_the_file_that_kuberay_names_builds_it(args: dict[str, str]) -> None:
    deployments = built(call_user_app_builder_with_args_if_necessary(app, args))
    assert deployments["engine"].num_replicas == int(args.get("replicas", 1))


def test_a_controller_that_others_copy_from_runs_where_its_folder_is() -> None:
    shared = built(application(SETTINGS))["controller"]
    settings = read_fleet_settings(["base", "--replicas", "2", "--replica-state-dir", "/copies"])
    copied = built(application(settings))["controller"]
    assert "resources" not in shared.ray_actor_options or not shared.ray_actor_options["resources"]
    assert copied.ray_actor_options["resources"] == {"node:__internal_head__": 0.001}
    assert settings.replica_state_dir == Path("/copies") and "--replica-state-dir" not in settings.serve
