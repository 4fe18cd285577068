"""Takes adapters into the catalog beside the server: once, or for as long as it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from serve.config import ServeConfig
from serve.watch import FolderWatch
from vllm_lora_ext.inbox import Inbox, Item
from vllm_lora_ext.inspection import Inspection

_LONGEST_STOP_S = 10.0  # for an adapter that is being taken; what is half written is swept at the next start


@contextmanager
def taking(inbox: Inbox, items: Sequence[Item], config: ServeConfig) -> Iterator[FolderWatch | FirstIntake]:
    """Take new adapters into the catalog beside the server, which serves them as they come."""
    intake: FolderWatch | FirstIntake = FirstIntake(inbox, items)
    if config.watch and (config.adapters or config.modules):
        intake = FolderWatch(config.adapters, config.modules, inbox)
    thread = threading.Thread(target=intake.run, name="adapter-inbox", daemon=True)
    thread.start()
    try:
        yield intake
    finally:
        intake.stop()
        thread.join(_LONGEST_STOP_S)


class FirstIntake:
    """Takes what is there at the start, once; nothing is watched."""

    def __init__(self, inbox: Inbox, items: Sequence[Item]) -> None:
        self._inbox, self._items = inbox, items
        self._pending = {item.source.name: "it is being admitted" for item in items if item.is_pending}

    def run(self) -> None:
        """Until all of it is taken."""
        self._inbox.take_all(self._items, self._taken)
        self._pending.clear()

    def _taken(self, item: Item, _: Inspection) -> None:
        self._pending.pop(item.source.name, None)

    def stop(self) -> None:
        """After what it is at."""
        self._inbox.stop()

    def pending(self) -> dict[str, str]:
        """Names that are not taken yet."""
        return self._pending.copy()

    def incomplete(self) -> dict[str, str]:
        """None: what is incomplete at the start is refused."""
        return {}
