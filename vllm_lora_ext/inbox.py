"""From sources to the catalog: what is new is taken, what is unchanged is not read, what is gone retires.

A folder is an inbox, the catalog is the truth. A folder is taken only when the content of its files
differs from what was taken last; so a restart, a rollback or a `rm` is never undone by a folder that
simply lies there. Whatever one folder holds, the others are taken all the same.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from vllm_lora_ext.background import lower_priority
from vllm_lora_ext.catalog import Catalog, now
from vllm_lora_ext.chat_override import AS_IT_IS, ChatOverride
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.errors import AdapterRefused, BadInput, StoreFailed, VllmLoraError
from vllm_lora_ext.inspection import Inspection, Rules, inspect_adapter, source_signature
from vllm_lora_ext.intake import Admitted, admit
from vllm_lora_ext.names import name_key, taken
from vllm_lora_ext.records import FolderRecord, Version
from vllm_lora_ext.sources import AdapterSource, fetched
from vllm_lora_ext.spec import Finding, printable

logger = logging.getLogger("vllm.vllm_lora")

RULES_FORMAT = 1  # raise it when admission learns something, so that refusals are looked at again
_WORKERS = 4  # most of the time is waiting for the disk
_SAVE_EVERY_S = 0.5  # the state file is written whole, so not for every adapter of a thousand

# These are no property of the files' content, so the folder is looked at again every time.
_PASSING = frozenset(
    {
        *("permission_denied", "too_many_files", "read_failed", "adapter_missing", "changed_while_reading"),
        *("adapter_exists", "source_unreachable", "store_failed", "internal_error", "checksum_mismatch"),
        "template_refused",  # its trial may have met a busy machine
        "stated_chat_invalid",  # it is the base model's tokenizer that is missing
        "proof_unfinished",  # the engine could not be asked
    }
)


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


@dataclass(frozen=True)
class Condition:
    """What an adapter has to meet besides admission, before it goes live.

    `check` gets its name and its stored version, and raises AdapterRefused; a refusal is looked at again
    when `mark` is another. `waits`: for an engine that is only starting.
    """

    mark: str
    check: Callable[[str, Version], None]
    waits: bool = True


_Outcome: TypeAlias = Admitted | Inspection | VllmLoraError
_Done: TypeAlias = Callable[[Item, Inspection], None]


class Inbox:
    """Takes the adapters of sources into a catalog, judged by `rules`.

    `chat` are the chat settings that are stated for some of them, by name.
    """

    def __init__(
        self,
        catalog: Catalog,
        rules: Rules,
        chat: Mapping[str, ChatOverride] | None = None,
        condition: Condition | None = None,
    ) -> None:
        self.catalog, self.rules, self._chat = catalog, rules, dict(chat or {})
        self.condition = condition
        self._stopped = threading.Event()
        base = rules.base.fingerprint if rules.base else ""
        self._rules_mark = " ".join(
            [
                *(str(RULES_FORMAT), base, *sorted(rules.allow), *sorted(rules.base_names)),
                *([condition.mark] if condition else []),
            ]
        )

    def scan(self, sources: Sequence[AdapterSource], retire: bool = True) -> list[Item]:
        """Look at every source without reading weights.

        With `retire`, names whose folder is not among the sources leave the catalog.
        """
        if retire:
            self._retire(sources)
        known = self.catalog.folders()
        items, names = [], set[str]()
        for source in {source.key: source for source in sources}.values():
            try:
                item = self._look(source, known.get(source.key))
            except Exception as error:  # whatever a folder holds, the others are looked at
                item = Item(source, None, _unread(source, [_internal_error(source.name, error)]))
            if name_key(source.name) in names:
                inspection = item.inspection or _unread(source)
                item = dataclasses.replace(
                    item, record=None, inspection=inspection.with_findings([taken(source.name)])
                )
            names.add(name_key(source.name))
            items.append(item)
        return items

    def _look(self, source: AdapterSource, record: FolderRecord | None) -> Item:
        stated = self._stated(source)
        if record is not None and record.chat != stated.digest:
            record = None
        if source.folder is None:  # what was fetched once stays until it is published again
            return Item(source, record if record and record.source_digest else None)
        if record is not None and record.signature == source_signature(source.folder):
            same_rules = record.rules == self._rules_mark
            if same_rules or not record.findings:
                return Item(source, record)
        return Item(source, None, inspect_adapter(source.folder, self.rules, source.name, False, stated))

    def _stated(self, source: AdapterSource) -> ChatOverride:
        return self._chat.get(source.name, AS_IT_IS)

    def _retire(self, sources: Sequence[AdapterSource]) -> None:
        there = {source.key for source in sources}
        with self.catalog.together():  # nobody else removes a name in between
            gone = set(self.catalog.folders()) - there
            names = [entry.name for entry in self.catalog.entries() if entry.folder in gone]
            if gone:
                self.catalog.remove(names, forget_folders=gone)

    def take_all(self, items: Iterable[Item], done: _Done | None = None) -> None:
        """Admit every pending item and publish it; a refusal is noted and logged, and stops nobody else.

        `done` hears of each item once what became of it is on the disk.
        """
        finished: list[tuple[Item, _Outcome]] = []
        saved = time.monotonic()
        for outcomes in self._outcomes([item for item in items if item.is_pending]):
            finished += outcomes
            if finished and time.monotonic() - saved > _SAVE_EVERY_S:
                if self._publish_all(finished, done):
                    finished = []
                saved = time.monotonic()
        self._publish_all(finished, done)
        self.catalog.collect()

    def stop(self) -> None:
        """Let `take_all` end after what it is at; the rest is taken the next time."""
        self._stopped.set()

    def _outcomes(self, pending: Sequence[Item]) -> Iterator[list[tuple[Item, _Outcome]]]:
        """What became of the items, as they come: a large one keeps nobody waiting.

        Now and then an empty list, so that what came before can be saved.
        """
        waiting = iter(pending)
        running: dict[Future[_Outcome], Item] = {}
        with ThreadPoolExecutor(_WORKERS, "adapter-intake", initializer=lower_priority) as pool:
            while True:
                while len(running) < 2 * _WORKERS and not self._stopped.is_set():
                    item = next(waiting, None)
                    if item is None:
                        break
                    running[pool.submit(self._admit, item)] = item
                if not running:
                    return
                done = wait(running, _SAVE_EVERY_S, FIRST_COMPLETED).done
                yield [(running.pop(future), future.result()) for future in done]

    def _admit(self, item: Item) -> _Outcome:
        """What became of it; what the quick look refused is not read again."""
        if item.inspection is not None and not item.inspection.admitted:
            return item.inspection
        try:
            stated = self._stated(item.source)
            with fetched(item.source, self.catalog.incoming) as folder:
                admitted = admit(
                    folder, self.catalog.store, self.rules, item.source.name, item.inspection, stated
                )
            self._check(item.source, admitted)
            return admitted
        except VllmLoraError as error:
            return error
        except Exception as error:  # a flaw of ours, or of a library that fetches: the others go on
            logger.exception("Adapter %s could not be judged", printable(item.source.name))
            return _unread(item.source, [_internal_error(item.source.name, error)])

    def _check(self, source: AdapterSource, admitted: Admitted) -> None:
        if self.condition is None:
            return
        try:
            version = version_of(admitted, self.catalog, self.rules, source)
            self.condition.check(source.name, version)
        except BaseException:
            admitted.version.release()
            raise

    def _publish_all(self, finished: Sequence[tuple[Item, _Outcome]], done: _Done | None) -> bool:
        """Whether all of it is on the disk; if not, it is tried again with the next."""
        try:
            with self.catalog.together():
                inspections = [self._publish(item, outcome) for item, outcome in finished]
        except StoreFailed as error:
            logger.error("%s", error)
            return False
        for (item, outcome), inspection in zip(finished, inspections, strict=True):
            if isinstance(outcome, Admitted):
                outcome.version.release()
            if done is not None:
                done(item, inspection)
        return True

    def _publish(self, item: Item, outcome: _Outcome) -> Inspection:
        if isinstance(outcome, Admitted):
            try:
                self._take(item, outcome)
                return outcome.inspection
            except StoreFailed:
                raise
            except VllmLoraError as error:
                outcome = error
        findings = findings_of(item.source.name, outcome)
        told = "; ".join(map(str, findings))
        logger.warning("Adapter %s is refused: %s", printable(item.source.name), told)
        if item.inspection is not None and not {finding.code for finding in findings} & _PASSING:
            self._note(item, self._record(item, item.inspection, None, findings))
        return dataclasses.replace(item.inspection or _unread(item.source), findings=findings)

    def _take(self, item: Item, admitted: Admitted) -> None:
        """Publish what was admitted, unless the folder holds what was taken from it before."""
        key, old = item.source.key, self.catalog.folders().get(item.source.key)
        record = self._record(item, admitted.inspection, admitted.source_digest, ())
        if old is not None and old.source_digest == admitted.source_digest:
            self._note(item, record)
            return
        version = version_of(admitted, self.catalog, self.rules, item.source)
        self.catalog.publish(item.source.name, version, folder=key, record=record)

    def _note(self, item: Item, record: FolderRecord) -> None:
        if self.catalog.folders().get(item.source.key) != record:
            self.catalog.note_folders({item.source.key: record})

    def _record(
        self, item: Item, looked_at: Inspection, source_digest: str | None, findings: tuple[Finding, ...]
    ) -> FolderRecord:
        """What was judged, by the signature that it had then: what is written since is news.

        A refused folder keeps the digest of what was last taken from it, which is still served.
        """
        old = self.catalog.folders().get(item.source.key)
        kept = old.source_digest if old and source_digest is None else source_digest
        signature = () if item.source.is_remote else looked_at.signature
        name, stated = printable(item.source.name), self._stated(item.source)
        return FolderRecord(kept, signature, name, findings, self._rules_mark, stated.digest)


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
        source=source.path if source.is_remote else Path(source.path).name,
        findings=inspection.findings,
        signature=tuple(tuple(part) for part in catalog.store.signature(digest)),
        options={name: value for name, value in source.options.items() if value},
    )


def findings_of(name: str, outcome: Inspection | VllmLoraError) -> tuple[Finding, ...]:
    """Why something was not taken, as findings."""
    if isinstance(outcome, Inspection | AdapterRefused):
        return tuple(outcome.findings)
    code = "source_unreachable" if isinstance(outcome, BadInput) else "store_failed"
    return (Finding(code, printable(outcome.item or name), outcome.rule, outcome.fix),)


def _internal_error(name: str, error: Exception) -> Finding:
    rule = f"could not be judged ({type(error).__name__})"
    return Finding("internal_error", printable(name), rule, "Please report it with the adapter's files.")


def _unread(source: AdapterSource, findings: Sequence[Finding] = ()) -> Inspection:
    return Inspection(source.name, Path(source.path), None, ChatSettings(), tuple(findings))
