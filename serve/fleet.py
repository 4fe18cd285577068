"""The fleet: every adapter that was asked for, found, read and judged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.inspection import Inspection, inspect_adapter
from vllm_lora_ext.peft_format import CONFIG_FILE, adapter_folders
from vllm_lora_ext.spec import EngineLimits, Finding


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter comes from; `path` may be a hub id when it came from `--lora-modules`."""

    name: str
    path: str

    @property
    def is_local(self) -> bool:
        """Whether we can read it; a hub id is left to vLLM."""
        return Path(self.path).exists() or self.path.startswith((".", "/", "~"))


def find_sources(adapters: Sequence[str], stated: Sequence[AdapterSource] = ()) -> list[AdapterSource]:
    """The sources behind `--adapters` values (a folder of adapters, an adapter, or name=path) and `stated`.

    Raises:
        BadSetting: a folder is absent.
    """
    sources = []
    for value in adapters:
        name, separator, path = value.partition("=")
        if separator and not Path(value).exists():
            sources.append(AdapterSource(name, path))
            continue
        if not Path(value).is_dir():
            raise BadSetting(
                f"--adapters {value}",
                "no such folder",
                "Check the path, or make the folder: an empty one is fine with --base-model.",
            )
        sources += [
            AdapterSource(folder.resolve().name, str(folder)) for folder in adapter_folders(Path(value))
        ]
    return [*sources, *stated]


def agreed_base_model(sources: Sequence[AdapterSource]) -> str:
    """The base model that all readable adapters name in their own config.

    Raises:
        BadSetting: they name none, or several.
    """
    named: dict[str, list[str]] = {}
    for source in sources:
        try:
            config = json.loads((Path(source.path) / CONFIG_FILE).read_text(encoding="utf-8"))
            base = config["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(base, str) and base:
            named.setdefault(str(Path(base).resolve()) if Path(base).is_dir() else base, []).append(
                source.name
            )
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
    sources: Sequence[AdapterSource], base: BaseModel | None, limits: EngineLimits
) -> list[Inspection]:
    """Judge every local source; of two with one name the second is refused."""
    inspections: list[Inspection] = []
    seen: set[str] = set()
    for source in sources:
        if not source.is_local:
            continue
        inspection = inspect_adapter(Path(source.path), base, source.name, limits)
        if source.name in seen:
            rule = "another adapter has this name"
            fix = "Rename one of the two folders, or give name=path."
            finding = Finding("adapter_exists", source.name, rule, fix)
            inspection = dataclasses.replace(inspection, findings=(*inspection.findings, finding))
        seen.add(source.name)
        inspections.append(inspection)
    return inspections


def fleet_table(inspections: Sequence[Inspection], title: str | None = None) -> Table:
    """Adapter, rank, size, template, state, and the reason if refused or unproven."""
    table = Table("adapter", "rank", "size", "template", "state", "reason", title=title)
    for item in inspections:
        rank = str(item.spec.max_rank) if item.spec else "-"
        size = f"{item.spec.size_bytes / 1e6:.1f} MB" if item.spec else "-"
        reason = "\n".join(str(finding) for finding in item.findings)
        table.add_row(item.name, rank, size, item.chat.state, item.state, reason)
    return table
