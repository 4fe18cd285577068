"""Where adapters from folders wait, in their own threads, until the server has proved them.

Folders are looked at from before the engine starts until after it ends; proofs are made in the event loop
of the running server.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError

from serve.proving import UNFINISHED
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.records import Version
from vllm_lora_ext.spec import Finding

_LOOK_EVERY_S = 0.2
Require = Callable[[str, Version], Awaitable[None]]


class ProofGate:
    """`check` waits for `open`, and for the proof; `close` ends all waiting. One server opens it once."""

    def __init__(self) -> None:
        self._opened, self._closed = threading.Event(), threading.Event()
        self._require: Require
        self._loop: asyncio.AbstractEventLoop

    def open(self, require: Require, loop: asyncio.AbstractEventLoop) -> None:
        """The engine is up; `require` raises AdapterRefused for what must not go live."""
        self._require, self._loop = require, loop
        self._opened.set()

    def close(self) -> None:
        """The server ends."""
        self._closed.set()

    def check(self, name: str, version: Version) -> None:
        """Return once a version may go live.

        Raises:
            AdapterRefused: it must not, or the server ends.
        """
        while not self._opened.wait(_LOOK_EVERY_S):
            self._must_be_open(name)
        work = self._required(name, version)
        try:
            proof = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop has ended
            work.close()
            raise _ended(name) from None
        try:
            while not proof.done():
                self._must_be_open(name)
                self._closed.wait(_LOOK_EVERY_S / 10)
            proof.result()
        except CancelledError:
            raise _ended(name) from None
        finally:
            proof.cancel()

    async def _required(self, name: str, version: Version) -> None:
        await self._require(name, version)

    def _must_be_open(self, name: str) -> None:
        if self._closed.is_set():
            raise _ended(name)


def _ended(name: str) -> AdapterRefused:
    rule = "was not proved before the server ended"
    return AdapterRefused(name, [Finding(UNFINISHED, name, rule, "It is proved at the next start.")])
