"""The fleet: every adapter that was asked for or published, found, judged, and shown."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vllm_lora_ext.admission import judge_rank, refused
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inbox import Item
from vllm_lora_ext.inspection import Inspection, Rules
from vllm_lora_ext.peft_format import named_base_model
from vllm_lora_ext.publishing import judge_published
from vllm_lora_ext.records import Entry
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.spec import Finding, printable


@dataclass(frozen=True)
class FleetRow:
    """One adapter as people see it: `rank` and `size_bytes` are None when it could not be read."""

    name: str
    version: str | None
    rank: int | None
    size_bytes: int | None
    template: str
    state: str
    findings: tuple[Finding, ...]

    @property
    def is_refused(self) -> bool:
        """Whether it is not served."""
        return self.state == "refused"


def default_state_dir(places: Sequence[str]) -> Path:
    """Where the state of these folders is kept unless somebody says otherwise.

    `$XDG_STATE_HOME/vllm-lora/` and 12 digits of the digest of the folder's real path.
    """
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    real = sorted(place if "://" in place else os.path.realpath(Path(place).expanduser()) for place in places)
    return home / "vllm-lora" / hashlib.sha256("\n".join(real).encode()).hexdigest()[:12]


def agreed_base_model(sources: Sequence[AdapterSource], remembered: str | None = None) -> str:
    """The base model that all readable adapters name in their own config; `remembered` if none does.

    Raises:
        BadSetting: they name none, or several.
    """
    named: dict[str, list[str]] = {}
    for source in sources:
        base = named_base_model(source.folder) if source.folder else None
        if base:
            base = str(Path(base).resolve()) if Path(base).is_dir() else base
            named.setdefault(base, []).append(source.name)
    if len(named) == 1:
        return next(iter(named))
    if not named and remembered:
        return remembered
    if not named:
        raise BadSetting(
            "the base model", "is named by no adapter", "Give it with --base-model DIR_OR_HUB_ID."
        )
    listed = "; ".join(f"{base} ({', '.join(names[:10])})" for base, names in named.items())
    raise BadSetting(
        "the base model",
        f"differs between the adapters: {listed}",
        "Serve one base at a time, or say which with --base-model.",
    )


def fleet_rows(items: Sequence[Item], catalog: Catalog, rules: Rules) -> list[FleetRow]:
    """What was looked at and what was published before; of a name that is both, what was looked at."""
    rows = {}
    for entry in catalog.entries():
        rows[entry.name, False] = entry_row(
            entry, judge_published(entry.name, entry.live_version, catalog, rules)
        )
    for item in items:
        row = _item_row(item, rules)
        if row is None:
            continue
        if not row.is_refused:
            rows.pop((row.name, False), None)
        rows[row.name, row.is_refused] = row
    return [rows[key] for key in sorted(rows)]


def _item_row(item: Item, rules: Rules) -> FleetRow | None:
    if item.inspection is not None:
        return inspection_row(item.inspection, rules)
    if item.record is not None and item.record.findings:
        return FleetRow(item.source.name, None, None, None, "-", "refused", item.record.findings)
    if item.record is None:
        return FleetRow(item.source.name, None, None, None, "-", "fetched next", ())
    return None  # nothing new: the catalog knows it


def inspection_row(inspection: Inspection, rules: Rules | None = None) -> FleetRow:
    """A folder that was looked at."""
    spec, findings, state = inspection.spec, list(inspection.findings), inspection.state
    if spec is not None and rules is not None:
        known = {finding.code for finding in findings}
        findings += [f for f in judge_rank(spec.name, spec.max_rank, rules.limits) if f.code not in known]
        state = "refused" if refused(findings) else state
    rank, size = (spec.max_rank, spec.size_bytes) if spec else (None, None)
    return FleetRow(inspection.name, None, rank, size, inspection.chat.state, state, tuple(findings))


def entry_row(entry: Entry, findings: Sequence[Finding] = ()) -> FleetRow:
    """A published name by its live version; `findings` are what speaks against it now."""
    version = entry.live_version
    state = "refused" if refused(findings) else version.state
    told = tuple(findings) or version.findings
    return FleetRow(
        entry.name, version.short, version.rank, version.size_bytes, version.template, state, told
    )


def fleet_table(rows: Sequence[FleetRow], title: str | None = None) -> Table:
    """Adapter, version where there is one, rank, size, template, state, and the reason if there is one."""
    versions = any(row.version for row in rows)
    columns = ["adapter", *(["version"] if versions else []), "rank", "size", "template", "state", "reason"]
    table = Table(*columns, title=title)
    for row in rows:
        rank = "-" if row.rank is None else str(row.rank)
        size = "-" if row.size_bytes is None else f"{row.size_bytes / 1e6:.1f} MB"
        reason = "\n".join(str(finding) for finding in row.findings)
        version = [row.version or "-"] if versions else []
        table.add_row(printable(row.name), *version, rank, size, row.template, row.state, reason)
    return table
