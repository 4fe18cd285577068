"""Pieces that have come meanwhile go on as one: what a piece costs in Ray does not depend on its size."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


async def in_pieces_of(size: int, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of `pieces` in pieces of at least `size`, but for the last."""
    buffer = bytearray()
    async for piece in pieces:
        buffer += piece
        if len(buffer) >= size:
            yield bytes(buffer)
            buffer.clear()
    if buffer:
        yield bytes(buffer)


async def coalesced(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The bytes of `pieces`, as few pieces as whoever takes them has time for; raises what `pieces` raises.

    A piece that is waited for goes on at once, so nobody waits longer for it.
    """
    come, news, buffer = False, asyncio.Event(), bytearray()

    async def read() -> None:
        nonlocal come
        try:
            async for piece in pieces:
                buffer.extend(piece)
                news.set()
        finally:
            come = True
            news.set()

    reading = asyncio.create_task(read())
    try:
        while not (come and not buffer):
            await news.wait()
            news.clear()
            if buffer:
                taken = bytes(buffer)
                buffer.clear()
                yield taken
            if come:
                news.set()
        await reading
    finally:
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reading
