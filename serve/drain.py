"""How a server stops: nothing new is let in, what was accepted ends, and only then the engine is told.

vLLM tells its engine as soon as a signal comes, and from then on the engine takes nothing: neither what comes
now, nor what was accepted and waits for its turn or its adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from serve.openai_errors import ApiError

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")


class Drain:
    """Counts what has been accepted and has not ended. Belongs to the event loop: no other thread uses it."""

    def __init__(self) -> None:
        self.stopping = False
        self.accepted = 0
        self._empty = asyncio.Event()

    def check(self) -> None:
        """Raises ApiError 503 once the server was told to stop.

        The connection is closed with it: over the same one a client would only ask this server again.
        """
        if self.stopping:
            headers = {"Retry-After": "1", "Connection": "close"}
            raise ApiError(503, "The server is stopping.", "stopping", "server_error", None, headers)

    @contextmanager
    def request(self) -> Iterator[None]:
        """From the acceptance of a request to the end of its response."""
        self.accepted += 1
        try:
            yield
        finally:
            self.accepted -= 1
            if not self.accepted:
                self._empty.set()

    async def stop(self, timeout_s: float) -> None:
        """Let nothing in, and wait until what was accepted has ended, for `timeout_s` at most."""
        if not self.stopping:
            self.stopping = True
            logger.info("Stopping: %d requests may end, within %.0f s", self.accepted, timeout_s)
        if self.accepted:
            self._empty.clear()
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                logger.warning("Stopping: %d requests did not end within %.0f s", self.accepted, timeout_s)
