"""The files of deploy/ as data, for the tests that judge them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
BUILT = sorted((KUBERNETES / "built").glob("*.yaml"))
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
USER = 10001

Object = dict[str, Any]


def source_of(built: Path) -> Path:
    """The folder that a built file is made of."""
    overlay = KUBERNETES / "overlays" / built.stem
    return overlay if overlay.is_dir() else KUBERNETES / built.stem


def objects(path: Path) -> list[Object]:
    """The objects of a file of manifests."""
    return [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


def compose() -> Object:
    """The compose file."""
    body: Object = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return body


def pod_templates(item: Object) -> Iterator[Object]:
    """The templates of pods anywhere in an object."""
    if isinstance(item, dict):
        for name, value in item.items():
            if name == "template" and "spec" in value:
                yield value
            else:
                yield from pod_templates(value)
    elif isinstance(item, list):
        for value in item:
            yield from pod_templates(value)


def containers(pod: Object) -> list[Object]:
    """All containers of a pod's spec."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def named(item: Object, kind: str, name: str) -> bool:
    """Whether an object is this one."""
    return bool(item["kind"] == kind and item["metadata"]["name"] == name)


def commands() -> list[tuple[str, list[str]]]:
    """Where and how `vllm-lora` is started: by images, by the compose file, by pods."""
    found = []
    for path in DOCKERFILES:
        for words in re.findall(r"^CMD (\[.+\])$", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append((path.name, yaml.safe_load(words)))
    for name, service in compose()["services"].items():
        if "build" in service:
            found.append((f"compose.yaml {name}", service["command"]))
    for path in BUILT:
        for item in objects(path):
            for template in pod_templates(item):
                for container in containers(template["spec"]):
                    if container["image"].startswith("vllm-lora:") and "args" in container:
                        found.append((path.name, container["args"]))
    return [(place, words) for place, words in found if words[0] != "ray"]


def environment() -> list[tuple[str, str]]:
    """Where which variable is set for a server."""
    found = []
    for path in DOCKERFILES:
        text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
        for words in re.findall(r"^ENV (.+)$", text, re.MULTILINE):
            found += [(path.name, name) for name in re.findall(r"([A-Z_0-9]+)=", words)]
    for name, service in compose()["services"].items():
        if "build" in service:
            found += [(f"compose.yaml {name}", variable) for variable in service.get("environment", ())]
    for path in BUILT:
        for item in objects(path):
            for template in pod_templates(item):
                for container in containers(template["spec"]):
                    if container["image"].startswith("vllm-lora:"):
                        found += [(path.name, entry["name"]) for entry in container.get("env", ())]
    return found
