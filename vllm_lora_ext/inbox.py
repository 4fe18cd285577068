"""From sources to the catalog: what is new is taken, what is unchanged is not read, what is gone retires.

A folder is an inbox, the catalog is the truth. A folder is taken only when the content of its files
differs from what was taken last; so a restart, a rollback or a `rm` is never undone by a folder that
simply lies there.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vllm_lora_ext.background import lower_priority
from vllm_lora_ext.catalog import Catalog, now
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.errors import AdapterExists, AdapterRefused, BadInput, StoreFailed, VllmLoraError
from vllm_lora_ext.inspection import Inspection, Rules, inspect_adapter, source_signature
from vllm_lora_ext.intake import Admitted, admit
from vllm_lora_ext.names import name_key, taken
from vllm_lora_ext.records import FolderRecord, Version
from vllm_lora_ext.sources import AdapterSource, fetched
from vllm_lora_ext.spec import Finding

logger = logging.getLogger("vllm.vllm_lora")

RULES_FORMAT = 1  # raise it when admission learns something, so that refusals are looked at again
_WORKERS = 4  # most of the time is waiting for the disk
_SAVE_EVERY_S = 0.5  # the state file is written whole, so not for every adapter of a thousand


@dataclass(frozen=True)
class Item:
    """One source as it stands: `record` is what the catalog knows of it, if nothing changed since.

    `inspection` is the quick look at a changed one (config, header and chat settings).
    """

    source: AdapterSource
    record: FolderRecord | None = None
    inspection: Inspection | None = None

    @property
    def is_pending(self) -> bool:
        """Whether it has still to be taken."""
        return self.record is None


_Outcome: TypeAlias = Admitted | Inspection | VllmLoraError
_Done: TypeAlias = Callable[[Item, Inspection], None]


class Inbox:
    """Takes the adapters of sources into a catalog, judged by `rules`."""

    def __init__(self, catalog: Catalog, rules: Rules) -> None:
        self.catalog, self.rules = catalog, rules
        base = rules.base.fingerprint if rules.base else ""
        self._stopped = threading.Event()
        self._rules_mark = f"{RULES_FORMAT} {base} {' '.join(sorted(rules.allow))}".strip()

    def scan(self, sources: Sequence[AdapterSource]) -> list[Item]:
        """Look at every source without reading weights; names whose folder is gone leave the catalog."""
        self._retire(sources)
        known = self.catalog.folders()
        items, names = [], set[str]()
        for source in {source.key: source for source in sources}.values():
            item = self._look(source, known.get(source.key))
            if name_key(source.name) in names:
                item = dataclasses.replace(item, record=None, inspection=_twin(source, item.inspection))
            names.add(name_key(source.name))
            items.append(item)
        return items

    def _look(self, source: AdapterSource, record: FolderRecord | None) -> Item:
        if source.folder is None:
            return Item(source, record)  # what was fetched once stays until it is published again
        if record is not None and record.signature == source_signature(source.folder):
            same_rules = record.rules == self._rules_mark
            if same_rules or not record.findings:
                return Item(source, record)
        return Item(source, None, inspect_adapter(source.folder, self.rules, source.name))

    def _retire(self, sources: Sequence[AdapterSource]) -> None:
        there = {source.key for source in sources}
        gone = set(self.catalog.folders()) - there
        names = [entry.name for entry in self.catalog.entries() if entry.folder in gone]
        if gone:
            self.catalog.remove(names, forget_folders=gone)

    def take_all(self, items: Iterable[Item], done: _Done | None = None) -> None:
        """Admit every pending item and publish it; a refusal is noted and logged, and stops nobody else.

        `done` hears of each item once what became of it is on the disk.
        """
        pending = [item for item in items if item.is_pending]
        with ThreadPoolExecutor(_WORKERS, "adapter-intake", initializer=lower_priority) as pool:
            finished: list[tuple[Item, _Outcome]] = []
            saved = time.monotonic()
            for item, outcome in zip(pending, pool.map(self._admit, pending), strict=True):
                if outcome is None:
                    break
                finished.append((item, outcome))
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    self._publish_all(finished, done)
                    finished, saved = [], time.monotonic()
            self._publish_all(finished, done)
        self.catalog.collect()

    def stop(self) -> None:
        """Let `take_all` end after what it is at; the rest is taken the next time."""
        self._stopped.set()

    def _publish_all(self, finished: Sequence[tuple[Item, _Outcome]], done: _Done | None) -> None:
        with self.catalog.together():
            inspections = [self._publish(item, outcome) for item, outcome in finished]
        for (item, outcome), inspection in zip(finished, inspections, strict=True):
            if isinstance(outcome, Admitted):
                outcome.version.release()
            if done is not None:
                done(item, inspection)

    def _admit(self, item: Item) -> _Outcome | None:
        """What became of it, None once we were stopped; what the quick look refused is not read again."""
        if self._stopped.is_set():
            return None
        if item.inspection is not None and not item.inspection.admitted:
            return item.inspection
        try:
            with fetched(item.source, self.catalog.state_dir / "incoming") as folder:
                return admit(folder, self.catalog.store, self.rules, item.source.name, item.inspection)
        except VllmLoraError as error:
            return error

    def _publish(self, item: Item, outcome: _Outcome) -> Inspection:
        if isinstance(outcome, Admitted):
            try:
                self._take(item, outcome)
                return outcome.inspection
            except AdapterExists as error:
                outcome = error
        findings = findings_of(item.source.name, outcome)
        if not isinstance(outcome, StoreFailed):
            self._note(item, self._record(item, None, findings))
        logger.warning("Adapter %s is refused: %s", item.source.name, "; ".join(map(str, findings)))
        return dataclasses.replace(item.inspection or _unread(item.source), findings=findings)

    def _take(self, item: Item, admitted: Admitted) -> None:
        """Publish what was admitted, unless the folder holds what was taken from it before."""
        key, old = item.source.key, self.catalog.folders().get(item.source.key)
        record = self._record(item, admitted.source_digest, ())
        if old is not None and old.source_digest == admitted.source_digest:
            self._note(item, record)
            return
        version = version_of(admitted, self.catalog, self.rules, item.source)
        self.catalog.publish(item.source.name, version, folder=key, record=record)

    def _note(self, item: Item, record: FolderRecord) -> None:
        if self.catalog.folders().get(item.source.key) != record:
            self.catalog.note_folders({item.source.key: record})

    def _record(self, item: Item, source_digest: str | None, findings: tuple[Finding, ...]) -> FolderRecord:
        """A refused folder keeps the digest of what was last taken from it, which is still served."""
        folder, old = item.source.folder, self.catalog.folders().get(item.source.key)
        kept = old.source_digest if old and source_digest is None else source_digest
        signature = () if folder is None else source_signature(folder)
        return FolderRecord(kept, signature, item.source.name, findings, self._rules_mark)


def version_of(admitted: Admitted, catalog: Catalog, rules: Rules, source: AdapterSource) -> Version:
    """The catalog's record of an admitted adapter."""
    inspection, digest = admitted.inspection, admitted.version.digest
    spec = inspection.spec
    assert spec is not None, "it was admitted"
    return Version(
        digest=digest,
        rank=spec.max_rank,
        size_bytes=spec.size_bytes,
        template=inspection.chat.state,
        state=inspection.state,
        base=rules.base.fingerprint if rules.base else "",
        published_at=now(),
        source=source.path if source.is_remote else str(Path(source.path).name),
        findings=inspection.findings,
        signature=_frozen(catalog.store.signature(digest)),
        options={name: value for name, value in source.options.items() if value},
    )


def findings_of(name: str, outcome: Inspection | VllmLoraError) -> tuple[Finding, ...]:
    """Why something was not taken, as findings."""
    if isinstance(outcome, Inspection | AdapterRefused):
        return tuple(outcome.findings)
    code = "source_unreachable" if isinstance(outcome, BadInput) else "store_failed"
    return (Finding(code, outcome.item or name, outcome.rule, outcome.fix),)


def _unread(source: AdapterSource) -> Inspection:
    return Inspection(source.name, Path(source.path), None, ChatSettings(), ())


def _twin(source: AdapterSource, inspection: Inspection | None) -> Inspection:
    return (inspection or _unread(source)).with_findings([taken(source.name)])


def _frozen(signature: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(part) for part in signature)
