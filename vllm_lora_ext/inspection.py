"""One adapter folder, read and judged: what it is, how it wants to be asked, what speaks against it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_lora_ext.admission import SERVED_DTYPES, allow, is_base_weight, judge, refused
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.chat_override import AS_IT_IS, ChatOverride
from vllm_lora_ext.chat_template import check_template, judge_template
from vllm_lora_ext.contract import (
    CHAT_FILES,
    ChatSettings,
    read_chat_settings,
    read_provenance,
    stated_digests,
)
from vllm_lora_ext.errors import AdapterRefused, BadBaseModel, BadInput, BadSetting
from vllm_lora_ext.files import RegularFile, signature
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.peft_format import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    file_finding,
    fold,
    public_name,
    read_adapter,
)
from vllm_lora_ext.spec import AdapterSpec, EngineLimits, Finding, Severity, last_part
from vllm_lora_ext.tensor_file import TensorPlace
from vllm_lora_ext.values import judge_values, read_values

SOURCE_FILES = (CONFIG_FILE, WEIGHTS_FILE, *CHAT_FILES)


@dataclass(frozen=True)
class Rules:
    """What adapters are judged by: the base, its names, the engine's limits, and what is let pass.

    `allow` are codes of findings that do not refuse (where that is safe, see `admission.NOT_ALLOWABLE`);
    `follow_links` is off for what somebody uploads.
    """

    base: BaseModel | None = None
    base_names: tuple[str, ...] = ()
    limits: EngineLimits = field(default_factory=EngineLimits)
    allow: frozenset[str] = frozenset()
    follow_links: bool = True


@dataclass(frozen=True)
class Inspection:
    """`spec` is None when the adapter could not be read; `findings` then says why."""

    name: str
    path: Path
    spec: AdapterSpec | None
    chat: ChatSettings
    findings: tuple[Finding, ...]
    places: tuple[TensorPlace, ...] = ()
    signature: tuple[tuple[int, ...], ...] = ()  # of the files when they were read

    @property
    def admitted(self) -> bool:
        return self.spec is not None and not refused(self.findings)

    @property
    def state(self) -> str:
        """One word for tables: `admitted`, `unproven` (the engine decides) or `refused`."""
        if not self.admitted:
            return "refused"
        unproven = any(finding.severity is Severity.UNPROVEN for finding in self.findings)
        return "unproven" if unproven else "admitted"

    def with_findings(self, findings: Collection[Finding], allowed: Collection[str] = ()) -> Inspection:
        """The same with more to say."""
        more = allow(list(findings), allowed)
        return dataclasses.replace(self, findings=(*self.findings, *more))


def inspect_adapter(
    path: Path,
    rules: Rules | None = None,
    name: str | None = None,
    try_template: bool = True,
    stated: ChatOverride = AS_IT_IS,
) -> Inspection:
    """Read config, header and chat settings of `path` and judge them; never raises for what it holds.

    Takes milliseconds: the values of the weights are left to `inspect_values`. With `try_template` a chat
    template that nobody tried before is rendered in a child process, which takes a tenth of a second. What
    is `stated` of the chat settings stands in the place of what the folder says.
    """
    rules = rules or Rules()
    name = public_name(path) if name is None else name
    seen = source_signature(path)
    reading = read_adapter(path, name, rules.follow_links)
    findings = [*judge_name(name, rules.base_names), *reading.findings]
    if reading.spec is not None:
        findings += judge(reading.spec, rules.base, rules.limits)
        findings += _judge_named_base(reading.spec, rules)
    chat, of_chat = _read_chat(path, rules, stated, try_template)
    findings = allow(fold(findings + of_chat), rules.allow)
    return Inspection(name, path, reading.spec, chat, tuple(findings), reading.places, seen)


def source_signature(path: Path) -> tuple[tuple[int, ...], ...]:
    """Sizes, times and inodes of the files that make an adapter: equal while nobody writes to them."""
    return tuple(signature(path / name) or () for name in SOURCE_FILES)


def inspect_values(inspection: Inspection, rules: Rules | None = None) -> Inspection:
    """The same after one pass over the weights: finite, in range, of some effect, as `identity.json` says."""
    rules = rules or Rules()
    if inspection.spec is None or not inspection.places:
        return inspection
    weights = inspection.path / WEIGHTS_FILE
    try:
        stated = stated_digests(inspection.path, rules.follow_links)
        with RegularFile(weights, rules.follow_links) as file:
            peaks = read_values(file, kept_places(inspection))
            changed = file.has_changed()
        findings = judge_values(inspection.spec, peaks)
        findings += judge_digests(inspection.path, stated, rules.follow_links)
    except BadInput:
        return inspection  # identity.json is damaged, which has been said
    except (OSError, ValueError) as error:
        return inspection.with_findings([file_finding(error, WEIGHTS_FILE)])
    if changed:
        findings.append(file_finding(ValueError(), WEIGHTS_FILE))
    return inspection.with_findings(fold(findings), rules.allow)


def kept_places(inspection: Inspection) -> list[TensorPlace]:
    """The tensors that are the adapter's own, of a dtype that can be looked at."""
    return [
        place
        for place in inspection.places
        if not is_base_weight(place.spec.name) and place.spec.dtype in SERVED_DTYPES
    ]


def judge_digests(
    path: Path, stated: Mapping[str, str], follow_links: bool, known: Mapping[str, str] | None = None
) -> list[Finding]:
    """Files whose digest differs from the one stated; `known` are digests of files that were read already."""
    findings = []
    for name, digest in sorted(stated.items()):
        if name not in SOURCE_FILES:
            continue  # not served
        found = (known or {}).get(name) or _digest_of(path / name, follow_links)
        if found != digest:
            rule = "is not the file that identity.json was written for (its SHA-256 differs)"
            fix = (
                "Copy the whole folder again; if you changed it yourself, remove `files` from identity.json."
            )
            findings.append(Finding("checksum_mismatch", name[:120], rule, fix))
    return findings


def _digest_of(path: Path, follow_links: bool) -> str | None:
    digest = hashlib.sha256()
    try:
        with RegularFile(path, follow_links) as file:
            for start in range(0, file.size, 1 << 20):
                digest.update(file.read(min(1 << 20, file.size - start), start))
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def judge_chat(chat: ChatSettings, rules: Rules, try_template: bool = True) -> list[Finding]:
    """What speaks against rendering an adapter's template; nothing if it is the base's own."""
    if chat.template is None or (rules.base and chat.template == _template_of_base(rules.base.name)):
        return []
    return judge_template(chat.template) if try_template else check_template(chat.template)


@functools.lru_cache(maxsize=16)
def _template_of_base(name: str) -> str | None:
    """The template that the base itself brings, which the server renders anyway; None for a hub id."""
    try:
        return read_chat_settings(Path(name)).template if Path(name).is_dir() else None
    except (BadInput, OSError):
        return None


def _read_chat(
    path: Path, rules: Rules, stated: ChatOverride, try_template: bool
) -> tuple[ChatSettings, list[Finding]]:
    effective = os.access in os.supports_effective_ids
    if not path.is_dir() or not os.access(path, os.R_OK | os.X_OK, effective_ids=effective):
        return ChatSettings(), []  # which has been said
    chat, findings = ChatSettings(), []
    try:
        chat = read_chat_settings(path, rules.follow_links)
    except BadInput as error:
        code = getattr(error, "code", "chat_settings_invalid")
        findings.append(Finding(code, error.item, error.rule, error.fix))
    try:
        chat = stated.apply(chat, rules.base)
    except BadSetting as error:
        return ChatSettings(), [*findings, Finding("stated_chat_invalid", error.item, error.rule, error.fix)]
    return chat, findings + judge_chat(chat, rules, try_template)


def _judge_named_base(spec: AdapterSpec, rules: Rules) -> list[Finding]:
    """The base that it names may go by another name here; only another fingerprint is another base."""
    if rules.base is None:
        return []
    who, differs = _named_base(spec, rules, rules.base)
    if differs:
        rule = f"was trained on {last_part(who)!r}, whose config is not that of {rules.base.public_name}"
        fix = "Serve it on its own base; --allow base_mismatch serves it all the same."
        return [Finding("base_mismatch", spec.name, rule, fix)]
    if differs is None:
        rule = f"{last_part(who)!r} cannot be read here, so only names and shapes tell that it fits"
        return [Finding("base_unread", "base_model_name_or_path", rule, "", Severity.NOTE)]
    return []


def _named_base(spec: AdapterSpec, rules: Rules, base: BaseModel) -> tuple[str, bool | None]:
    """The base that the adapter names, and whether it is another than `base`; None if that cannot be told."""
    try:
        of_base = read_provenance(spec.path, rules.follow_links).get("base_model")
    except BadInput:
        of_base = None  # which is said with the chat settings
    if isinstance(of_base, dict) and isinstance(of_base.get("fingerprint"), str):
        return str(of_base.get("name")), of_base["fingerprint"] != base.fingerprint
    named = spec.base_model
    if named is None or named == base.name:
        return base.name, False
    # Somebody who uploads does not choose what is read here.
    return named, _is_other_base(named, base.fingerprint) if rules.follow_links else None


@functools.lru_cache(maxsize=256)  # a folder of adapters names one base, again and again
def _is_other_base(named: str, fingerprint: str) -> bool | None:
    """None if the base that is named cannot be read here."""
    try:
        return read_base_model(named, offline=True).fingerprint != fingerprint
    except BadBaseModel:
        return None


def require_admitted(inspection: Inspection) -> AdapterSpec:
    """The spec of an adapter that may be used.

    Raises:
        AdapterRefused: with every finding.
    """
    if inspection.spec is None or not inspection.admitted:
        raise AdapterRefused(inspection.name, inspection.findings)
    return inspection.spec
