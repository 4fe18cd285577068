"""Watches the folders of adapters as the server runs: what is new or changed is taken, what is gone retires.

Each look lists the folders and stats their files; only what is new is read. A look comes soon after an
event of the file system and while something is on its way, and otherwise about once a second: so links
that lead elsewhere, network disks and whatever else tells of no events need nothing of their own.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from watchfiles import watch

from serve.watched import Folder, Place, State
from vllm_lora_ext.errors import StoreFailed
from vllm_lora_ext.inbox import Inbox, Item
from vllm_lora_ext.names import name_key
from vllm_lora_ext.records import FolderRecord
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.spec import printable

logger = logging.getLogger("vllm.vllm_lora")

_OVERDUE_S = 30.0
_STEP_MS = 100
_SOON_S, _IDLE_S = 0.25, 1.0  # between looks; longer where looks would take much of a processor:
_SOON_TIMES, _IDLE_TIMES = 4, 25  # so many times what the last one took
_BATCHES, _BATCH = 4, 32  # taken side by side: one that takes minutes keeps nobody waiting


class FolderWatch:
    """Keeps a catalog in step with the folders behind `values` of `--adapters`, and with `modules`.

    `poll` does without events of the file system.
    """

    def __init__(
        self,
        values: Sequence[str],
        modules: Sequence[AdapterSource],
        inbox: Inbox,
        poll: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places, self._modules = [Place(value) for value in values], modules
        self._inbox, self._poll, self._clock = inbox, poll, clock
        self._stopped, self._looking = threading.Event(), threading.Lock()
        self._folders: dict[tuple[str, str], Folder] = {}
        self._in_hurry = True  # something is on its way
        self._takers: list[threading.Thread] = []
        # Read by other threads, so the first two are replaced as a whole.
        self._waiting: dict[str, str] = {}
        self._overdue: dict[str, str] = {}
        self._admitting: dict[tuple[str, str], Item] = {}

    def pending(self) -> dict[str, str]:
        """Public name -> why it is not taken yet: it is incomplete, being looked at or being admitted."""
        admitting = self._admitting.copy().values()
        return self._waiting | {item.source.name: "is being admitted" for item in admitting}

    def incomplete(self) -> dict[str, str]:
        """Public name -> what is missing, of the folders that are incomplete for 30 s or longer."""
        return self._overdue.copy()

    def stop(self) -> None:
        """Let `run` return once what is being admitted is done."""
        self._stopped.set()
        self._inbox.stop()

    def run(self) -> None:
        """Watch until `stop`, beginning with a look at all; never raises for what a folder holds."""
        has_news, cost, ended = False, 0.0, -math.inf
        for told in self._events():
            has_news |= told
            soon, idle = max(_SOON_S, _SOON_TIMES * cost), max(_IDLE_S, _IDLE_TIMES * cost)
            if time.monotonic() - ended < (soon if has_news or self._in_hurry else idle):
                continue
            began, has_news = time.thread_time(), False
            if items := self._ready():
                taker = threading.Thread(target=self._take, args=(items,), name="adapter-watch", daemon=True)
                self._takers.append(taker)
                taker.start()
            cost, ended = time.thread_time() - began, time.monotonic()
        for taker in self._takers:
            taker.join()

    def look(self) -> None:
        """Look once, and take what is ready before this returns."""
        if items := self._ready():
            self._take(items)

    # When to look.

    def _events(self) -> Iterator[bool]:
        """Until `stop`, every tenth of a second or sooner: whether something may have changed."""
        while not self._stopped.is_set():
            yield True
            began, roots = False, self._roots()
            try:
                for told in self._events_at(roots):
                    began = True
                    yield told
            except Exception as error:
                if not began and roots == self._roots():  # the limit of folders to watch, say
                    self._poll = True
                    logger.warning("No changes are told (%s); folders are looked at once a second.", error)
                self._stopped.wait(_STEP_MS / 1000)  # or a name that is no UTF-8: begin anew

    def _events_at(self, roots: Mapping[Path, tuple[int, int]]) -> Iterator[bool]:
        """The same for folders that are there, until one comes, goes or is replaced."""
        if self._poll or not roots:
            while not self._stopped.wait(_STEP_MS / 1000) and (self._poll or not self._roots()):
                yield False
            return
        for changes in watch(
            *roots,
            watch_filter=None,
            debounce=2 * _STEP_MS,
            step=_STEP_MS // 2,
            rust_timeout=_STEP_MS,
            yield_on_timeout=True,
            stop_event=self._stopped,
            raise_interrupt=False,
            ignore_permission_denied=True,
        ):
            yield bool(changes)
            if self._roots() != roots:
                return

    def _roots(self) -> dict[Path, tuple[int, int]]:
        """The folders to watch that are there, with what tells whether they are still the same."""
        roots = (place.root for place in self._places)
        identities = ((root, _identity(root)) for root in roots if root is not None)
        return {root: identity for root, identity in identities if identity is not None}

    # Looking.

    def _ready(self) -> list[Item]:
        """Look at everything; what is to be taken now."""
        with self._looking:
            try:
                return self._look_around()
            except Exception:  # a flaw of ours; the next look may do better
                logger.exception("The folders of adapters could not be looked at")
                return []

    def _look_around(self) -> list[Item]:
        now = self._clock()
        self._list(now)
        # In this order: what is no longer being admitted has its record.
        admitting, records = set(self._admitting.copy()), self._inbox.catalog.folders()
        there = [folder for folder in self._folders.values() if folder.is_there]
        for folder in there:
            try:
                folder.look(records, self._clock, _id(folder.source) in admitting)
            except Exception:  # a flaw of ours, too; the others are looked at
                logger.exception("Adapter %s could not be looked at", printable(folder.source.name))
                folder.rest(now)
        self._retire(records)
        items = self._hand_over(there)
        self._waiting = {folder.source.name: folder.reason for folder in there if folder.reason}
        self._overdue = {
            folder.source.name: folder.reason
            for folder in there
            if folder.reason and folder.incomplete_since <= now - _OVERDUE_S
        }
        is_missing = any(folder.missing_since is not None for folder in self._folders.values())
        self._in_hurry = is_missing or len(self._waiting) > len(self._overdue)
        return items

    def _list(self, now: float) -> None:
        """Bring the list of folders up to date; where a place cannot be listed its folders are let be."""
        listed = {_id(source): Folder(source) for source in self._modules}
        for place in self._places:
            place.look()
            if place.is_listed:
                for source in place.sources:
                    listed.setdefault(_id(source), Folder(source, place))
        for key, folder in listed.items():
            folder = self._folders.setdefault(key, folder)
            folder.is_there, folder.missing_since = True, None
        for key, folder in list(self._folders.items()):
            if key in listed:
                continue
            if folder.place is not None and not folder.place.is_listed:
                folder.is_there = False
            elif folder.miss(now, _is_folder_of_its_own(folder, listed)):
                del self._folders[key]

    def _retire(self, records: Mapping[str, FolderRecord]) -> None:
        """Take the names out of the catalog whose folders are gone, if it is known of all that there are."""
        folders = self._folders.values()
        keys = {folder.key for folder in folders}
        is_complete = "" not in keys and all(place.is_listed for place in self._places)
        gone = records.keys() - keys
        if not is_complete or not gone:
            return
        catalog = self._inbox.catalog
        try:
            with catalog.together():
                names = [entry.name for entry in catalog.entries() if entry.folder in gone]
                catalog.remove(names, forget_folders=gone)
        except StoreFailed as error:
            logger.error("%s", error)
        for folder in folders:
            folder.retry()  # one that was refused for a name that is free now

    def _hand_over(self, there: Sequence[Folder]) -> list[Item]:
        """What is to be taken of those that are ready."""
        self._takers = [taker for taker in self._takers if taker.is_alive()]
        ready = [folder for folder in there if folder.state is State.READY]
        chosen = [folder for folder in there if folder.state is State.KNOWN]
        chosen += ready[:_BATCH] if len(self._takers) < _BATCHES else []
        names = {name_key(folder.source.name) for folder in chosen}
        # Of two with one name the scan takes the first, so those that came before stand before.
        taken = [folder for folder in there if names and folder.state in (State.SETTLED, State.ADMITTING)]
        twins = [folder for folder in taken if name_key(folder.source.name) in names]
        folders = {_id(folder.source): folder for folder in chosen}
        items = []
        for item in self._inbox.scan([folder.source for folder in (*twins, *chosen)], retire=False):
            folder = folders.get(_id(item.source))
            if folder is None:
                continue
            if item.is_pending:
                self._admitting[_id(item.source)] = item
                folder.hand_over()
                items.append(item)
            else:
                folder.state = State.SETTLED
        return items

    # Taking.

    def _take(self, items: Sequence[Item]) -> None:
        try:
            self._inbox.take_all(items, lambda item, _: self._ended(item))
        except Exception:  # a flaw of ours; those that were not taken are tried again later
            logger.exception("Adapters could not be taken")
        finally:
            for item in items:
                self._ended(item)

    def _ended(self, item: Item) -> None:
        key = _id(item.source)
        if self._admitting.get(key) is item:  # or it changed, and is being admitted again
            del self._admitting[key]


def _id(source: AdapterSource) -> tuple[str, str]:
    """What a source is remembered by while the server runs."""
    return source.name, source.path


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino


def _is_folder_of_its_own(folder: Folder, listed: Mapping[tuple[str, str], Folder]) -> bool:
    """Whether a folder that is no adapter any more is there, and has not become one of other adapters."""
    path = folder.source.folder
    if path is None or not os.path.isdir(path):  # noqa: PTH112  Path.is_dir raises where nobody may look
        return False
    return not any(other.startswith(f"{path}{os.sep}") for _, other in listed)
