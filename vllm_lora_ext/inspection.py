"""One adapter folder, read and judged: what it is, how it wants to be asked, what speaks against it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from vllm_lora_ext.admission import admit, judge_name, refused
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.contract import ChatSettings, read_chat_settings
from vllm_lora_ext.errors import AdapterRefused, BadInput
from vllm_lora_ext.peft_format import read_adapter
from vllm_lora_ext.spec import AdapterSpec, EngineLimits, Finding, folder_name


@dataclass(frozen=True)
class Inspection:
    """`spec` is None when the adapter could not be read; `findings` then says why."""

    name: str
    path: Path
    spec: AdapterSpec | None
    chat: ChatSettings
    findings: tuple[Finding, ...]

    @property
    def admitted(self) -> bool:
        return not refused(self.findings)

    @property
    def state(self) -> str:
        """One word for tables: `admitted`, `unproven` (the engine decides) or `refused`."""
        if not self.admitted:
            return "refused"
        return "unproven" if self.findings else "admitted"


def inspect_adapter(
    path: Path,
    base: BaseModel | None,
    name: str | None = None,
    limits: EngineLimits | None = None,
    base_names: Collection[str] = (),
) -> Inspection:
    """Read `path` and judge it against `base`; never raises for what the folder holds.

    `base_names` are the names that the base is served under, which no adapter may take.
    """
    name = name or folder_name(path)
    reading = read_adapter(path, name)
    findings = [*judge_name(name, base_names), *reading.findings]
    if reading.spec is not None:
        findings += admit(reading.spec, base, limits)
    try:
        chat = read_chat_settings(path)
    except BadInput as error:
        chat = ChatSettings()
        findings.append(Finding("chat_settings_invalid", name, str(error).rstrip("."), "Repair the file."))
    return Inspection(name, path, reading.spec, chat, tuple(findings))


def require_admitted(inspection: Inspection) -> AdapterSpec:
    """The spec of an adapter that may be used.

    Raises:
        AdapterRefused: with every finding.
    """
    if inspection.spec is None or not inspection.admitted:
        raise AdapterRefused(inspection.name, inspection.findings)
    return inspection.spec
