"""What the catalog remembers: frozen records, and how they look in the state file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_lora_ext.errors import AdapterUnknown
from vllm_lora_ext.spec import Finding, Severity

_HISTORY = 100  # events per name
_SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class Version:
    """A stored version as the catalog knows it; no weights are read to answer for it.

    `state` is `admitted` or `unproven`, `template` one of `trained`, `unproven`, `base`. `base` is the
    fingerprint of the base model that it was judged against. `signature` notices changed store files.
    """

    digest: str
    rank: int
    size_bytes: int
    template: str
    state: str
    base: str
    published_at: str
    source: str = ""
    findings: tuple[Finding, ...] = ()
    signature: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)  # vLLM's own, from --lora-modules

    @property
    def short(self) -> str:
        """The first 12 digits of the digest."""
        return self.digest[:12]

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Version:
        """From what `dataclasses.asdict` made of one, also after JSON."""
        return cls(**{**body, "findings": _findings(body), "signature": _signature(body)})


@dataclass(frozen=True)
class Event:
    """Something that made a version live, or split the traffic."""

    at: str
    what: str
    digest: str


@dataclass(frozen=True)
class Entry:
    """A name: its versions, oldest first; the live one; what happened; percent of the traffic by digest.

    `folder` is the key of the folder that the name came from, None when it came by command.
    """

    name: str
    live: str
    versions: tuple[Version, ...]
    history: tuple[Event, ...]
    traffic: Mapping[str, int] = field(default_factory=dict)
    folder: str | None = None

    @property
    def live_version(self) -> Version:
        """The version that answers to the bare name."""
        return next(version for version in self.versions if version.digest == self.live)

    def find(self, digest: str | None = None) -> Version:
        """The live version, or the one whose digest begins with `digest` (at least 4 digits).

        Raises:
            AdapterUnknown: there is none, or several.
        """
        wanted = self.live if digest is None else digest
        if len(wanted) < _SHORTEST_PREFIX:
            rule = f"is too short for the beginning of a digest: {_SHORTEST_PREFIX} digits at least"
            raise AdapterUnknown(repr(wanted)[:80], rule, "`vllm-lora show` lists the versions.")
        found = [version for version in self.versions if version.digest.startswith(wanted)]
        if len(found) != 1:
            there = ", ".join(version.digest[:12] for version in self.versions)
            rule = f"is {'several versions' if len(found) > 1 else 'no version'} of {self.name}"
            raise AdapterUnknown(repr(wanted)[:80], rule, f"There is: {there}.")
        return found[0]

    def previous(self) -> str | None:
        """The digest that was published before the live one and is still there."""
        digests = [version.digest for version in self.versions]
        place = digests.index(self.live)
        return digests[place - 1] if place else None

    @classmethod
    def new(cls, name: str, version: Version, event: Event, folder: str | None) -> Entry:
        """A name with its first version."""
        return cls(name, version.digest, (version,), (event,), {}, folder)

    def with_version(self, version: Version, event: Event, folder: str | None) -> Entry:
        """The same with `version` live; a command takes the name over from the folder that it came from."""
        kept = tuple(item for item in self.versions if item.digest != version.digest)
        owner = folder if self.folder is not None else None
        if version.digest == self.live:
            return dataclasses.replace(self, versions=(*kept, version), folder=owner)
        live = self.with_live(version.digest, event)
        return dataclasses.replace(live, versions=(*kept, version), folder=owner)

    def with_live(self, digest: str, event: Event) -> Entry:
        """The same with another live version; a traffic split ends."""
        history = (*self.history, event)[-_HISTORY:]
        return dataclasses.replace(self, live=digest, history=history, traffic={})

    def with_traffic(self, traffic: Mapping[str, int], event: Event) -> Entry:
        """The same with the requests split."""
        return dataclasses.replace(self, traffic=dict(traffic), history=(*self.history, event)[-_HISTORY:])

    def pruned(self, keep: int) -> Entry:
        """The same with its newest `keep` versions, and those that are live or have traffic."""
        newest = {version.digest for version in self.versions[-max(1, keep) :]}
        needed = newest | {self.live} | set(self.traffic)
        kept = tuple(version for version in self.versions if version.digest in needed)
        return dataclasses.replace(self, versions=kept, history=self.history[-_HISTORY:])


@dataclass(frozen=True)
class FolderRecord:
    """A folder that was looked at: the digest of its files, how to tell that they are the same, the outcome.

    `findings` are those of a refusal; a folder that was taken has none. `rules` says what it was
    judged by, so that a refusal is looked at again under other rules; `chat` is the digest of the chat
    settings that were stated for it then, which count like a file of the folder.
    """

    source_digest: str | None
    signature: tuple[tuple[int, ...], ...]
    name: str
    findings: tuple[Finding, ...] = ()
    rules: str = ""
    chat: str = ""


@dataclass
class State:
    """All of it; `copy` before a change."""

    entries: dict[str, Entry] = field(default_factory=dict)
    folders: dict[str, FolderRecord] = field(default_factory=dict)
    proofs: dict[str, dict[str, Any]] = field(default_factory=dict)
    base: dict[str, str] = field(default_factory=dict)

    def copy(self) -> State:
        """A copy whose tables can be changed; the records in them are frozen."""
        proofs = {digest: dict(proof) for digest, proof in self.proofs.items()}
        return State(dict(self.entries), dict(self.folders), proofs, dict(self.base))

    def entry(self, name: str) -> Entry:
        """A name with its versions.

        Raises:
            AdapterUnknown: there is none.
        """
        if name not in self.entries:
            known = ", ".join(sorted(self.entries)[:10]) or "no adapter"
            raise AdapterUnknown(repr(name)[:80], "is no adapter here", f"There is: {known}.")
        return self.entries[name]

    def digests(self) -> set[str]:
        """Every version that some name has."""
        return {version.digest for entry in self.entries.values() for version in entry.versions}

    def forget_proofs(self) -> None:
        """Drop what was proved of versions that no name has any more."""
        known = self.digests()
        self.proofs = {digest: proof for digest, proof in self.proofs.items() if digest in known}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> State:
        """The inverse of `to_json`; the checksum of the file has been compared."""
        return cls(
            {name: _entry(item) for name, item in body["entries"].items()},
            {key: _folder(item) for key, item in body["folders"].items()},
            dict(body["proofs"]),
            dict(body["base"]),
        )


def _entry(body: Mapping[str, Any]) -> Entry:
    versions = tuple(map(Version.from_json, body["versions"]))
    history = tuple(Event(**item) for item in body["history"])
    return Entry(**{**body, "versions": versions, "history": history})


def _folder(body: Mapping[str, Any]) -> FolderRecord:
    return FolderRecord(**{**body, "findings": _findings(body), "signature": _signature(body)})


def _findings(body: Mapping[str, Any]) -> tuple[Finding, ...]:
    return tuple(Finding(**{**item, "severity": Severity(item["severity"])}) for item in body["findings"])


def _signature(body: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(part) for part in body["signature"])
