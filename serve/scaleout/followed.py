"""A catalog that somebody else writes, in this process only read: names follow as they change.

The file is looked at twenty times a second, one `stat` each; once a change is read, requests that come are
answered by it, and the revision is told to whoever asks. What servers note beside names (proofs) and what
they tidy (versions that no name needs) is left to the one who writes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import StateUnreadable

logger = logging.getLogger("vllm.vllm_lora")

LOOK_EVERY_S = 0.05


class FollowedCatalog(Catalog):
    """See the module; `told` hears of each revision once it is in force, beginning with the first.

    Raises:
        StateUnreadable: the state file is damaged, or written by a later vllm-lora.
    """

    def __init__(self, state_dir: Path, told: Callable[[int], None] = lambda revision: None) -> None:
        super().__init__(state_dir, readonly=True)
        self._told, self._stopped = told, threading.Event()
        told(self.revision)
        self._thread = threading.Thread(target=self._follow, name="catalog-follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Follow no more."""
        if hasattr(self, "_stopped"):
            self._stopped.set()
        super().close()

    def collect(self) -> list[str]:
        """Nothing: the store belongs to the one who writes."""
        return []

    def record_proof(self, digest: str, kind: str, result: Mapping[str, Any]) -> None:
        """Not kept: a proof holds for the engine that made it."""

    def _follow(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            try:
                if self.refresh():
                    self._told(self.revision)
            except StateUnreadable as error:  # what was read last stays in force
                logger.error("%s", error)
                self._stopped.wait(1.0)
            except Exception:  # a flaw must not leave this server with names of yesterday
                logger.exception("The catalog cannot be followed")
                self._stopped.wait(1.0)
