"""What `vllm-lora serve --replicas` says before anything of Ray starts."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from serve.scaleout import launch
from serve.scaleout.settings import read_fleet_settings
from vllm_lora_ext.errors import BadSetting, MissingPackage


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_no_ray(name: str, *rest: Any) -> Any:
        return None if name == "ray" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_no_ray)
    with pytest.raises(MissingPackage, match=r"vllm-lora\[ray\]"):
        launch.main(["base", "--replicas", "2"])


def test_a_flag_that_does_not_go_with_replicas_is_told_at_once() -> None:
    with pytest.raises(BadSetting, match="--catalog-from-source"):
        read_fleet_settings(["base", "--replicas", "2", "--catalog-from-source"])


def test_the_fleet_listens_where_one_server_would() -> None:
    assert launch.address_of(read_fleet_settings(["base"])) == ("127.0.0.1", 8000)
    stated = ["base", "--host", "0.0.0.0", "--port=9"]
    assert launch.address_of(read_fleet_settings(stated)) == ("0.0.0.0", 9)
