"""Adapters as data: which state is told, and that nothing is lost on the way to a server's clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.adapter_tables import detail_lines
from serve.adapter_view import (
    LiveFacts,
    adapter_detail,
    adapter_view,
    finding_data,
    read_findings,
    unpublished_view,
)
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.records import Entry
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.spec import EngineLimits, Finding, Severity

REFUSED = Finding("rank_too_large", "x", "has rank 8", "Raise it.")
WARNED = Finding("odd", "x", "is odd", "Look at it.", Severity.WARNING)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "state")


@pytest.fixture
def entry(catalog: Catalog, make_adapter: Callable[..., Path]) -> Entry:
    return publish(AdapterSource("x", str(make_adapter())), catalog, Rules())[0]


@pytest.mark.parametrize(
    ("findings", "live", "state"),
    [
        ([], None, "stored"),
        ([WARNED], None, "stored"),
        ([REFUSED], None, "refused"),
        ([REFUSED], LiveFacts(), "refused"),
        ([], LiveFacts("cached"), "cached"),
        ([REFUSED], LiveFacts("slot"), "slot"),  # its folder is refused now, what was taken before is served
    ],
)
def test_where_an_adapter_is(
    findings: list[Finding], live: LiveFacts | None, state: str, entry: Entry
) -> None:
    view = adapter_view(entry, findings, live)
    assert view["state"] == state
    if findings:
        assert view["findings"] == [finding_data(finding) for finding in findings]


def test_all_views_have_the_same_keys_and_are_json(entry: Entry, catalog: Catalog) -> None:
    view, detail = adapter_view(entry, []), adapter_detail(entry, [], catalog)
    absent = unpublished_view("a\x1bb", "refused", [REFUSED])
    assert list(view) == list(absent) == list(detail)[: len(view)]
    assert json.loads(json.dumps([view, detail, absent])) == [view, detail, absent]
    assert absent["id"].isprintable() and absent["version"] is absent["digest"] is None


def test_versions_tell_whether_they_are_in_memory_and_may_be_served(entry: Entry, catalog: Catalog) -> None:
    live = LiveFacts("slot", resident_versions=frozenset({entry.live}))
    strict = Rules(limits=EngineLimits(max_lora_rank=4))
    (version,) = adapter_detail(entry, [], catalog, live)["versions"]
    assert (version["resident"], version["live"], version["state"]) == (True, True, "unproven")
    (version,) = adapter_detail(entry, [REFUSED], catalog, None, strict)["versions"]
    assert (version["resident"], version["state"]) == (False, "refused")


def test_a_damaged_version_has_no_chat_settings(entry: Entry, catalog: Catalog) -> None:
    folder = catalog.store.root / entry.live
    folder.chmod(0o755)
    (folder / "version.json").unlink()
    assert adapter_detail(entry, [], catalog)["chat"] is None


def test_findings_come_back_as_they_went(entry: Entry) -> None:
    findings = [REFUSED, WARNED]
    assert read_findings([finding_data(finding) for finding in findings]) == findings
    for nonsense in (None, 3, "x", {}, [None, 3, []]):
        assert read_findings(nonsense) == []
    (finding,) = read_findings([{"code": 3, "item": "\x1b[31m", "severity": ["x"]}])
    assert str(finding).isprintable() and finding.severity is Severity.REFUSED


def test_what_was_proved_is_shown_with_the_version_and_to_people(entry: Entry, catalog: Catalog) -> None:
    assert adapter_view(entry, [])["proof"] is None and adapter_detail(entry, [], catalog)["proofs"] == {}
    proof = {"verdict": "failed", "kind": "probes", "probes": 2, "tokens": 70, "largest": 8.0, "effect": 3.0}
    catalog.record_proof(entry.live, "parity", {**proof, "reasons": ["is scored differently\x1b[31m"]})
    detail = adapter_detail(entry, [], catalog)
    assert (detail["proof"], detail["versions"][0]["proof"]) == ("failed", "failed")
    assert detail["proofs"]["parity"]["probes"] == 2
    told = list(detail_lines(detail))
    assert "proof: failed; 2 probes, 70 tokens, off by 8 nats; effect 3 nats" in told
    assert all(line.isprintable() for line in told if "scored" in line)
    elsewhere = adapter_detail(entry, [], catalog, proofs=lambda digest: {})
    assert (elsewhere["proof"], elsewhere["proofs"]) == (None, {}), "it was proved on another engine"
