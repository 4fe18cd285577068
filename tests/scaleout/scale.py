"""Deploys a running fleet again with another number of replicas."""

from __future__ import annotations

import dataclasses
import sys

import ray
from ray import serve

from serve.scaleout.application import NAME, application
from serve.scaleout.settings import read_fleet_settings

if __name__ == "__main__":
    ray.init(address="auto", log_to_driver=False)
    replicas, settings = int(sys.argv[1]), read_fleet_settings(sys.argv[2:])
    settings = dataclasses.replace(settings, replicas=replicas, max_replicas=replicas)
    serve.run(application(settings), name=NAME, route_prefix="/", blocking=False)
