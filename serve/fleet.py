"""The fleet: every adapter that was asked for, found, read and judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_lora_ext.admission import judge_name
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inspection import Inspection, inspect_adapter
from vllm_lora_ext.peft_format import adapter_folders, read_adapter
from vllm_lora_ext.spec import EngineLimits, Finding, Severity, folder_name


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter comes from.

    `path` may be a hub id when it was stated with `--lora-modules`; `options`
    are what else was stated there, by the names of vLLM's `LoRAModulePath`.
    """

    name: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path | None:
        """The adapter's folder; None for a hub id, which is left to vLLM."""
        path = _expanded(self.path)
        return path if path.exists() or self.path.startswith((".", "/", "~")) else None


def find_sources(values: Sequence[str]) -> list[AdapterSource]:
    """The adapters behind values of `--adapters`: a folder of adapters, an adapter, or name=path.

    Raises:
        BadSetting: a folder is absent.
    """
    sources = []
    for value in values:
        whole = _expanded(value)
        name, separator, path = value.partition("=")
        if separator and not whole.exists():
            sources.append(AdapterSource(name, str(_existing(_expanded(path)))))
        else:
            folders = adapter_folders(_existing(whole))
            sources += [AdapterSource(folder_name(folder), str(folder)) for folder in folders]
    return sources


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise BadSetting(
            str(path),
            "no such folder of adapters",
            "Check the path, or make the folder: an empty one is fine with --base-model.",
        )
    return path


def agreed_base_model(sources: Sequence[AdapterSource]) -> str:
    """The base model that all readable adapters name in their own config.

    Raises:
        BadSetting: they name none, or several.
    """
    named: dict[str, list[str]] = {}
    for source in sources:
        spec = read_adapter(source.folder, source.name).spec if source.folder else None
        if spec and spec.base_model:
            base = spec.base_model
            base = str(Path(base).resolve()) if Path(base).is_dir() else base
            named.setdefault(base, []).append(source.name)
    if len(named) == 1:
        return next(iter(named))
    if not named:
        raise BadSetting(
            "the base model", "is named by no adapter", "Give it with --base-model DIR_OR_HUB_ID."
        )
    listed = "; ".join(f"{base} ({', '.join(names)})" for base, names in named.items())
    raise BadSetting(
        "the base model",
        f"differs between the adapters: {listed}",
        "Serve one base at a time, or say which with --base-model.",
    )


def inspect_fleet(
    sources: Sequence[AdapterSource],
    base_of: Callable[[AdapterSource], BaseModel | None],
    limits: EngineLimits,
    base_names: Collection[str] = (),
) -> list[Inspection]:
    """Judge every source; of two with one name the second is refused, a hub id stays unproven."""
    inspections: list[Inspection] = []
    seen: set[str] = set()
    for source in sources:
        inspection = _inspect(source, base_of, limits, base_names)
        if source.name in seen:
            rule = "another adapter has this name"
            fix = "Rename one of the two folders, or give name=path."
            finding = Finding("adapter_exists", source.name, rule, fix)
            inspection = dataclasses.replace(inspection, findings=(*inspection.findings, finding))
        seen.add(source.name)
        inspections.append(inspection)
    return inspections


def _inspect(
    source: AdapterSource,
    base_of: Callable[[AdapterSource], BaseModel | None],
    limits: EngineLimits,
    base_names: Collection[str],
) -> Inspection:
    if source.folder:
        return inspect_adapter(source.folder, base_of(source), source.name, limits, base_names)
    rule = "is no folder here, so it was not checked"
    fix = "vLLM takes it for a hub id and loads it."
    finding = Finding("adapter_remote", source.path, rule, fix, Severity.UNPROVEN)
    findings = (*judge_name(source.name, base_names), finding)
    return Inspection(source.name, Path(source.path), None, ChatSettings(), findings)


def fleet_table(inspections: Sequence[Inspection], title: str | None = None) -> Table:
    """Adapter, rank, size, template, state, and the reason if refused or unproven."""
    table = Table("adapter", "rank", "size", "template", "state", "reason", title=title)
    for item in inspections:
        rank = str(item.spec.max_rank) if item.spec else "-"
        size = f"{item.spec.size_bytes / 1e6:.1f} MB" if item.spec else "-"
        reason = "\n".join(str(finding) for finding in item.findings)
        table.add_row(item.name, rank, size, item.chat.state, item.state, reason)
    return table
