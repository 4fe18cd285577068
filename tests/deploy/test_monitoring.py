"""Dashboard and alerts: every expression parses, and asks for what a server really gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from serve.metrics import Metrics
from tests.conftest import ROOT
from tests.deploy.manifests import DEPLOY, KUBERNETES, objects

# Of a server of ours with a tiny base and two adapters, as /metrics gave it.
PAGE = (ROOT / "tests" / "deploy" / "metrics_page.txt").read_text(encoding="utf-8")
RULES = yaml.safe_load((DEPLOY / "monitoring" / "rules.yaml").read_text(encoding="utf-8"))["groups"]
ALERTS = [rule for group in RULES for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "monitoring" / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
OF_PROMETHEUS = {"up"}
OF_TARGETS = {"job", "instance", "namespace"}  # labels that Prometheus adds


def panels() -> Iterator[dict[str, Any]]:
    """Those that show something."""
    yield from (panel for panel in DASHBOARD["panels"] if panel["type"] != "row")


def expressions() -> list[str]:
    """Of alerts and panels, with Grafana's variables filled in."""
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    shown += [metric + "{}" for metric in re.findall(r"label_values\(([\w:]+),", json.dumps(DASHBOARD))]
    filled = [expr.replace("$__rate_interval", "1m") for expr in shown]
    return sorted({*filled, *(rule["expr"] for rule in ALERTS)})


def page_labels() -> dict[str, set[str]]:
    """Names on the page, as they are asked for, with their labels; those without a series have none."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(PAGE):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        for suffix in suffixes.get(family.type, ("",)):
            found.setdefault(family.name + suffix, set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


LABELS = page_labels()


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    """Every series that an expression asks for."""
    found = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found


@pytest.mark.parametrize("expression", expressions())
def test_an_expression_asks_for_what_is_on_the_page(expression: str) -> None:
    asked = selectors(expression)
    assert asked
    for selector in asked:
        if selector.name in OF_PROMETHEUS:
            continue
        assert selector.name in LABELS, f"{selector.name} is not on the page"
        if LABELS[selector.name]:
            matched = {matcher.name for matcher in selector.matchers.matchers}
            assert matched <= LABELS[selector.name] | OF_TARGETS


def test_a_renamed_metric_is_noticed_before_the_page_is_taken_again() -> None:
    registry = CollectorRegistry()
    Metrics(registry=registry)
    counted = {name for family in registry.collect() for name in (family.name, f"{family.name}_total")}
    for expression in expressions():
        for selector in selectors(expression):
            if selector.name.startswith("vllm_lora_"):
                assert re.sub("_(bucket|sum|count)$", "", selector.name) in counted


def test_a_metric_that_nobody_has_is_noticed() -> None:
    (selector,) = selectors("rate(vllm_lora_request_total[5m])")
    assert selector.name not in LABELS


# Alerts.


def test_the_operator_gets_the_same_rules() -> None:
    (rule,) = [
        item
        for item in objects(KUBERNETES / "monitoring" / "prometheusrule.yaml")
        if item["kind"] == "PrometheusRule"
    ]
    assert rule["spec"]["groups"] == RULES


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_has_a_runbook(alert: dict[str, Any]) -> None:
    document, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert anchor == alert["alert"].lower()
    text = (ROOT / document).read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### {alert['alert']}$\n+(.+?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(section.split()) > 30
    assert alert["labels"]["severity"] in ("warning", "critical")
    assert {"summary", "description"} < set(alert["annotations"])


def test_no_runbook_is_left_over() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^### (VllmLora\w+)$", text, re.MULTILINE)) == {rule["alert"] for rule in ALERTS}


# The dashboard.


def test_it_can_be_imported_as_it_is() -> None:
    assert DASHBOARD["id"] is None and DASHBOARD["uid"] and "__inputs" not in DASHBOARD
    assert {"datasource", "adapter"} <= set(VARIABLES)
    assert (
        VARIABLES["datasource"]["type"] == "datasource" and VARIABLES["datasource"]["query"] == "prometheus"
    )
    sources = re.findall(r'"uid": "([^"]+)"', json.dumps({**DASHBOARD, "uid": ""}))
    assert set(sources) == {"${datasource}"}


def test_its_panels_have_numbers_of_their_own_and_lie_side_by_side() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells and place["x"] + place["w"] <= 24
        taken |= cells


def test_every_panel_says_what_it_shows_and_every_variable_is_used() -> None:
    text = "\n".join(target["expr"] for panel in panels() for target in panel["targets"])
    used = {name for name in re.findall(r"\$(\w+)", text) if not name.startswith("__")}
    assert used | {"datasource"} == set(VARIABLES)
    for panel in panels():
        assert panel["title"] and panel["description"]
        assert [target["refId"] for target in panel["targets"]] == sorted("ABCDEF"[: len(panel["targets"])])


def test_grafana_and_prometheus_find_their_files() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]
    mounts = {
        name: dict(tuple(reversed(volume.split(":")[:2])) for volume in services[name]["volumes"])
        for name in ("prometheus", "grafana")
    }
    scrape = yaml.safe_load((DEPLOY / "monitoring" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert set(scrape["rule_files"]) <= set(mounts["prometheus"])
    assert any("prometheus.yaml" in word for word in services["prometheus"]["command"])
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    provider = DEPLOY / "monitoring" / "grafana" / "provisioning" / "dashboards" / "vllm-lora.yaml"
    (place,) = [entry["options"]["path"] for entry in yaml.safe_load(provider.read_text())["providers"]]
    assert any(target.startswith(place) for target in mounts["grafana"])
