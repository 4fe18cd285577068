"""An adapter as data: the one form in which `/v1/adapters` and `--json` show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_lora_ext.admission import refused
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import VersionDamaged, VersionMissing
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import judge_published
from vllm_lora_ext.records import Entry, Version
from vllm_lora_ext.spec import Finding, Severity, printable

FAILED, PROOF_FAILED = "failed", "proof_failed"  # a proof's verdict; the finding where one is required
PROOF = "parity"  # the kind of proof in the catalog that is shown by itself, see vllm_lora_ext/parity.py
Proofs = Callable[[str], Mapping[str, Any]]  # digest -> what was proved of that version, empty if nothing


@dataclass(frozen=True)
class LiveFacts:
    """What a running server knows of a name that no state folder tells.

    `state` is `slot`, `cached` or `stored`; None when the server does not serve the name.
    `resident_versions` are the digests of its versions that are in memory.
    """

    state: str | None = None
    requests: int = 0
    running: int = 0
    waiting: int = 0
    last_used: str | None = None
    load_seconds: float | None = None
    resident_versions: frozenset[str] = frozenset()


def adapter_view(
    entry: Entry,
    findings: Sequence[Finding],
    live: LiveFacts | None = None,
    proofs: Proofs = lambda digest: {},
) -> dict[str, Any]:
    """A published name by its live version; `findings` are what speaks against it now.

    What the server says of the state wins: a folder that was refused later changes nothing of what is served.
    """
    version, facts = entry.live_version, live or LiveFacts()
    return {
        **_identity(entry.name, version),
        "state": facts.state or ("refused" if refused(findings) else "stored"),
        "rank": version.rank,
        "size_bytes": version.size_bytes,
        "template": version.template,
        "admission": version.state,
        "proof": proofs(entry.live).get("verdict"),
        "traffic": {digest[:12]: percent for digest, percent in entry.traffic.items()},
        **_use(facts),
        "findings": [finding_data(finding) for finding in tuple(findings) or version.findings],
    }


def unpublished_view(name: str, state: str, findings: Sequence[Finding] = ()) -> dict[str, Any]:
    """A name that has no version: it is `refused`, `incomplete` or `loading`."""
    return {
        **_identity(printable(name), None),
        "state": state,
        "rank": None,
        "size_bytes": None,
        "template": None,
        "admission": None,
        "proof": None,
        "traffic": {},
        **_use(LiveFacts()),
        "findings": [finding_data(finding) for finding in findings],
    }


def removed_view(name: str) -> dict[str, Any]:
    """A name that was taken out of service."""
    return {"id": name, "object": "adapter", "deleted": True}


def adapter_detail(
    entry: Entry,
    findings: Sequence[Finding],
    catalog: Catalog,
    live: LiveFacts | None = None,
    rules: Rules | None = None,
    proofs: Proofs | None = None,
) -> dict[str, Any]:
    """The same with all versions, newest first, what happened, and how the live one wants to be asked.

    `rules` are those that the versions would be served by, `proofs` what holds where they would be served.
    """
    proofs = proofs or kept_proofs(catalog)
    resident = live.resident_versions if live else frozenset()
    versions = [
        _version_data(version, entry, catalog, rules or Rules(), version.digest in resident)
        | {"proof": proofs(version.digest).get("verdict")}
        for version in reversed(entry.versions)
    ]
    return {
        **adapter_view(entry, findings, live, proofs),
        "versions": versions,
        "history": [
            {"at": event.at, "what": event.what, "version": event.digest[:12]} for event in entry.history
        ],
        "chat": _chat_data(entry.live, catalog),
        "provenance": catalog.store.provenance(entry.live),
        "proofs": {PROOF: dict(proof)} if (proof := proofs(entry.live)) else {},
    }


def kept_proofs(catalog: Catalog) -> Proofs:
    """What was proved of versions wherever they were served last."""
    return lambda digest: catalog.proofs(digest).get(PROOF) or {}


def judged_badly(catalog: Catalog) -> tuple[int, int]:
    """How many folders hold an adapter that is refused, and how many adapters failed their proof."""
    refused = [record.findings for record in catalog.folders().values() if record.findings]
    kept = kept_proofs(catalog)
    failed = sum(kept(entry.live).get("verdict") == FAILED for entry in catalog.entries())
    failed += sum(any(finding.code == PROOF_FAILED for finding in findings) for findings in refused)
    return len(refused), failed


def finding_data(finding: Finding) -> dict[str, str]:
    """A finding for machines."""
    return {
        "code": finding.code,
        "item": finding.item,
        "rule": finding.rule,
        "fix": finding.fix,
        "severity": finding.severity.value,
    }


def read_findings(items: object) -> list[Finding]:
    """The inverse for what a server sent, which may be anything."""
    found = items if isinstance(items, list) else []
    return [_read_finding(item) for item in found if isinstance(item, dict)]


def _read_finding(item: Mapping[str, Any]) -> Finding:
    code, thing, rule, fix = (printable(str(item.get(key) or "")) for key in ("code", "item", "rule", "fix"))
    known = item.get("severity") in list(Severity)
    return Finding(code, thing, rule, fix, Severity(item["severity"]) if known else Severity.REFUSED)


def _identity(name: str, version: Version | None) -> dict[str, Any]:
    digests = (version.short, version.digest) if version else (None, None)
    return {"id": name, "object": "adapter", "version": digests[0], "digest": digests[1]}


def _use(facts: LiveFacts) -> dict[str, Any]:
    return {
        "requests": facts.requests,
        "running": facts.running,
        "waiting": facts.waiting,
        "last_used": facts.last_used,
        "load_seconds": facts.load_seconds,
    }


def _version_data(
    version: Version, entry: Entry, catalog: Catalog, rules: Rules, resident: bool
) -> dict[str, Any]:
    is_refused = refused(judge_published(entry.name, version, catalog, rules))
    return {
        "version": version.short,
        "digest": version.digest,
        "live": version.digest == entry.live,
        "rank": version.rank,
        "size_bytes": version.size_bytes,
        "template": version.template,
        "state": "refused" if is_refused else version.state,
        "published_at": version.published_at,
        "source": version.source,
        "resident": resident,
    }


def _chat_data(digest: str, catalog: Catalog) -> dict[str, Any] | None:
    """Chat settings of a stored version; None when it is damaged."""
    try:
        chat = catalog.store.open(digest).chat
    except (VersionDamaged, VersionMissing):
        return None
    return {
        "template": chat.template,
        "system_prompt": chat.system_prompt,
        "stop": list(chat.stop),
        "sampling": dict(chat.sampling),
    }
