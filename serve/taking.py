"""Takes adapters into the catalog beside the server: once, or for as long as it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serve.config import ServeConfig
from serve.watch import FolderWatch
from vllm_lora_ext.completeness import incomplete
from vllm_lora_ext.inbox import Inbox, Item
from vllm_lora_ext.inspection import Inspection

_LONGEST_STOP_S = 10.0  # for an adapter that is being taken; what is half written is swept at the next start


class Taking:
    """First what is there at the start, all at once; then, with `watch`, what comes and goes."""

    def __init__(self, inbox: Inbox, items: Sequence[Item], watch: FolderWatch | None) -> None:
        self._inbox, self._watch = inbox, watch
        pending = [item for item in items if item.is_pending]
        # Without a watch nobody looks again, so what is not whole is refused with the reason.
        self._items = [item for item in pending if watch is None or _is_whole(item)]
        self._first = {item.source.name: "it is being admitted" for item in self._items}

    def run(self) -> None:
        """Until all of it is taken, and for a watch until `stop`."""
        self._inbox.take_all(self._items, self._taken)
        self._first = {}
        if self._watch is not None:
            self._watch.run()

    def _taken(self, item: Item, _: Inspection) -> None:
        self._first = {name: why for name, why in self._first.items() if name != item.source.name}

    def stop(self) -> None:
        """End after what it is at."""
        self._inbox.stop()
        if self._watch is not None:
            self._watch.stop()

    def pending(self) -> dict[str, str]:
        """Names that are not taken yet, with the reason."""
        return self._first | (self._watch.pending() if self._watch is not None else {})

    def incomplete(self) -> dict[str, str]:
        """Names that have been incomplete for long, with what is missing."""
        return self._watch.incomplete() if self._watch is not None else {}


def _is_whole(item: Item) -> bool:
    return item.source.folder is None or incomplete(item.source.folder) is None


@contextmanager
def taking(inbox: Inbox, items: Sequence[Item], config: ServeConfig) -> Iterator[Taking]:
    """Take what is new in a thread, for the time of the block."""
    watch = None
    if config.watch and (config.adapters or config.modules):
        own = Inbox(inbox.catalog, inbox.rules, config.chat, inbox.condition)
        watch = FolderWatch(config.adapters, config.modules, own)
    work = Taking(inbox, items, watch)
    thread = threading.Thread(target=work.run, name="adapter-inbox", daemon=True)
    thread.start()
    try:
        yield work
    finally:
        work.stop()
        thread.join(_LONGEST_STOP_S)
