"""While the server has nothing to do, adapters come into the memory that nobody needs.

A load beside running requests takes time from them: some 50 ms of one core for a small adapter, which on a
CPU every stream feels. What is in memory before it is asked for costs its first request nothing.
"""

from __future__ import annotations

import asyncio
import logging

from serve.live import LiveAdapters
from serve.manager import Manager
from serve.openai_errors import ApiError
from vllm_lora_ext.errors import VllmLoraError

logger = logging.getLogger("vllm.vllm_lora")

_LOOK_EVERY_S = 0.5


async def preload(live: LiveAdapters, manager: Manager) -> None:
    """Until it is cancelled: the adapters that were used last come first, then all others by name."""
    filled: object = None  # what was there when nothing was left to do
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        try:
            revision = live.catalog.revision if live.catalog is not None else 0
            if manager.is_resting and filled != (revision, manager.memory()) and await _fill(live, manager):
                filled = (revision, manager.memory())
        except Exception:  # a flaw here must not keep the server from what it is asked
            logger.exception("Adapters cannot be loaded ahead")


async def _fill(live: LiveAdapters, manager: Manager) -> bool:
    """Load what is not in memory, one after the other; False as soon as somebody asks for something."""
    names = live.names()
    for name in sorted(names, key=lambda name: manager.use_of(name).last_used or "", reverse=True):
        try:
            version = live.resolve(name)
            is_stored = version is not None and manager.gate.state_of(version.model) == "stored"
            if version is not None and is_stored and not await manager.preload(version):
                return False
        except (ApiError, VllmLoraError) as error:
            logger.warning("Adapter %s was not loaded ahead: %s", name, error)
    return True
