"""The built manifests: what a cluster would refuse is refused here, and what they say of each other holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT
from tests.deploy.kinds import KINDS
from tests.deploy.manifests import (
    BUILT,
    KUBERNETES,
    USER,
    Object,
    containers,
    named,
    objects,
    pod_templates,
    source_of,
)

VERSION = "1.37"
REPLICAS = [path for path in BUILT if path.stem in ("cpu", "gpu", "gpu-bucket")]
PODS = [*REPLICAS, *(path for path in BUILT if path.stem == "kuberay")]
TEARDOWN_S = 30  # behind the last request the engine needs seconds to go; measured: 18 s for a tiny model
ids = {"ids": lambda path: path.stem}


def one(path: Path, kind: str, name: str = "vllm-lora") -> Object:
    """This object of a built file."""
    (item,) = [item for item in objects(path) if named(item, kind, name)]
    return item


def server(path: Path) -> tuple[Object, Object]:
    """The pod's spec and its container of the server."""
    pod = one(path, "Deployment")["spec"]["template"]["spec"]
    (container,) = [item for item in pod["containers"] if item["name"] == "server"]
    return pod, container


def argument(container: Object, flag: str) -> str:
    """What a flag is set to."""
    (value,) = [word.partition("=")[2] for word in container["args"] if word.partition("=")[0] == flag]
    return str(value)


def test_every_overlay_is_built() -> None:
    folders = {path.parent for path in KUBERNETES.rglob("kustomization.yaml")} - {KUBERNETES / "base"}
    assert {source_of(path) for path in BUILT} == folders


@pytest.mark.parametrize("path", BUILT, **ids)
def test_kubernetes_takes_every_object(path: Path) -> None:
    for item in objects(path):
        if item["kind"] in KINDS:
            jsonschema.validate(item, KINDS[item["kind"]])
        else:
            kubernetes_validate.validate(item, VERSION, strict=True)


@pytest.mark.parametrize("path", BUILT, **ids)
def test_kubernetes_takes_every_pod_within(path: Path) -> None:
    for item in objects(path):
        for template in pod_templates(item):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "a", **template.get("metadata", {})},
            }
            kubernetes_validate.validate({**pod, "spec": template["spec"]}, VERSION, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_a_custom_kind_does_not_have_is_refused(kind: str) -> None:
    (item, *_) = [item for path in BUILT for item in objects(path) if item["kind"] == kind]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**item, "spec": {**item["spec"], "replica": 1}}, KINDS[kind])


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
@pytest.mark.parametrize("path", BUILT, **ids)
def test_what_is_built_is_what_stands_in_the_overlay(path: Path) -> None:
    """As objects: versions of kubectl write them in different orders."""
    command = ["kubectl", "kustomize", str(source_of(path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fresh = [item for item in yaml.safe_load_all(done.stdout) if item]
    fix = f"kubectl kustomize {source_of(path).relative_to(ROOT)} > {path.relative_to(ROOT)}"
    assert in_order(fresh) == in_order(objects(path)), fix


def in_order(value: Any) -> Any:
    """Lists of named things in the order of their names."""
    if isinstance(value, dict):
        return {name: in_order(item) for name, item in value.items()}
    if isinstance(value, list):
        items = [in_order(item) for item in value]
        return sorted(items, key=name_of) if all(map(name_of, items)) else items
    return value


def name_of(item: Any) -> str:
    """The name by which kustomize merges a list's item; empty if it has none."""
    if not isinstance(item, dict):
        return ""
    if "kind" in item and "metadata" in item:
        return f"{item['kind']} {item['metadata']['name']}"
    return str(item.get("name", ""))


def test_the_overlays_use_what_kubectl_1_20_knows() -> None:
    """It builds by kustomize 2.0.3, where `resources` are files, and `patches` means something else."""
    known = {"apiVersion", "kind", "resources", "bases", "images", "patchesStrategicMerge", "patchesJson6902"}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        (body,) = objects(path)
        assert set(body) <= known, path
        for key in ("resources", "patchesStrategicMerge"):
            assert all((path.parent / name).is_file() for name in body.get(key, ())), path
        assert all((path.parent / name / "kustomization.yaml").is_file() for name in body.get("bases", ()))


# Rights.


@pytest.mark.parametrize("path", PODS, **ids)
def test_no_pod_has_rights_or_writes_its_root(path: Path) -> None:
    templates = [template for item in objects(path) for template in pod_templates(item)]
    assert templates
    for template in templates:
        pod = template["spec"]
        about = pod["securityContext"]
        assert about["runAsNonRoot"] and about["runAsUser"] == USER and about["fsGroup"] == USER
        assert about["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in containers(pod):
            about = container["securityContext"]
            assert about["readOnlyRootFilesystem"] and about["allowPrivilegeEscalation"] is False
            assert about["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


@pytest.mark.parametrize("path", PODS, **ids)
def test_no_service_becomes_a_variable_of_the_server(path: Path) -> None:
    """A service that is called `vllm-lora` would set VLLM_LORA_PORT to `tcp://...`."""
    templates = [template for item in objects(path) for template in pod_templates(item)]
    assert all(template["spec"]["enableServiceLinks"] is False for template in templates)


@pytest.mark.parametrize("path", PODS, **ids)
def test_names_of_containers_differ_and_their_mounts_exist(path: Path) -> None:
    for template in (template for item in objects(path) for template in pod_templates(item)):
        names = [container["name"] for container in containers(template["spec"])]
        assert len(names) == len(set(names))
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        for container in containers(template["spec"]):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("path", REPLICAS, **ids)
def test_the_server_reads_its_adapters_and_cannot_write_them(path: Path) -> None:
    _, container = server(path)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[argument(container, "--adapters")]["readOnly"]
    assert mounts[argument(container, "--base-model")]["readOnly"]
    assert Path(argument(container, "--state-dir")).is_relative_to("/state") and "/state" in mounts


@pytest.mark.parametrize("path", PODS, **ids)
def test_every_pod_is_behind_a_policy(path: Path) -> None:
    policies = [item["spec"] for item in objects(path) if item["kind"] == "NetworkPolicy"]
    selected = [policy["podSelector"]["matchLabels"] for policy in policies]
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    for template in (template for item in objects(path) for template in pod_templates(item)):
        labels = template["metadata"]["labels"].items()
        assert any(labels >= chosen.items() for chosen in selected)


# What belongs together.


@pytest.mark.parametrize("path", REPLICAS, **ids)
def test_grace_covers_what_happens_before_the_kill(path: Path) -> None:
    pod, container = server(path)
    (word, wait) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    drain = int(argument(container, "--shutdown-timeout"))
    assert drain > 0
    assert pod["terminationGracePeriodSeconds"] >= int(wait) + drain + TEARDOWN_S
    probe = container["readinessProbe"]
    assert drain > probe["periodSeconds"] * probe["failureThreshold"], "it is noticed while it drains"


@pytest.mark.parametrize("path", REPLICAS, **ids)
def test_a_pod_is_started_and_ready_when_the_server_says_so(path: Path) -> None:
    _, container = server(path)
    paths = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert str(ports[container["readinessProbe"]["httpGet"]["port"]]) == argument(container, "--port")
    startup = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert one(path, "Deployment")["spec"]["progressDeadlineSeconds"] > startup


@pytest.mark.parametrize("path", REPLICAS, **ids)
def test_service_budget_and_autoscaler_mean_the_same_pods(path: Path) -> None:
    deployment = one(path, "Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert one(path, "Service")["spec"]["selector"] == deployment["selector"]["matchLabels"]
    assert one(path, "PodDisruptionBudget")["spec"]["selector"] == deployment["selector"]
    autoscaler = one(path, "HorizontalPodAutoscaler")["spec"]
    assert autoscaler["scaleTargetRef"]["name"] == "vllm-lora"
    assert "replicas" not in deployment  # or every apply would undo the autoscaler
    assert autoscaler["minReplicas"] > one(path, "PodDisruptionBudget")["spec"]["maxUnavailable"]


def test_the_threads_on_the_cpu_are_the_cores_of_the_limit() -> None:
    _, container = server(KUBERNETES / "built" / "cpu.yaml")
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    resources = container["resources"]
    assert variables["OMP_NUM_THREADS"] == resources["limits"]["cpu"] == resources["requests"]["cpu"]
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert int(argument(container, "--kv-cache-memory-bytes")) < int(resources["limits"]["memory"][:-2]) << 30


def test_the_gateway_leads_to_the_pods_of_the_overlays() -> None:
    pool = one(KUBERNETES / "built" / "gateway.yaml", "InferencePool")["spec"]
    for path in REPLICAS:
        labels = one(path, "Deployment")["spec"]["template"]["metadata"]["labels"]
        assert pool["selector"]["matchLabels"].items() <= labels.items()
        _, container = server(path)
        assert str(pool["targetPorts"][0]["number"]) == argument(container, "--port")
    values = yaml.safe_load((KUBERNETES / "gateway" / "router-values.yaml").read_text())["router"]
    assert values["modelServers"]["matchLabels"] == pool["selector"]["matchLabels"]
    assert values["modelServers"]["targetPorts"] == pool["targetPorts"]
    picker = yaml.safe_load(values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]])
    known = {plugin["type"] for plugin in picker["plugins"]}
    used = {plugin["pluginRef"] for profile in picker["schedulingProfiles"] for plugin in profile["plugins"]}
    assert "lora-affinity-scorer" in used and used == known


def test_ray_starts_our_application() -> None:
    service = one(KUBERNETES / "built" / "kuberay.yaml", "RayService")["spec"]
    (application,) = yaml.safe_load(service["serveConfigV2"])["applications"]
    assert application["import_path"] == "deploy.ray.app:app" and application["route_prefix"] == "/"
    dockerfile = (ROOT / "deploy" / "Dockerfile.ray").read_text()
    assert f"ray[serve]=={service['rayClusterConfig']['rayVersion']}" in dockerfile
