"""An answer as it comes from a replica, piece by piece, and as it goes out to a client."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.responses import Response

from serve.scaleout.forwarding import Head, Lost, error_event

logger = logging.getLogger("ray.serve")

REPLICA_HEADER = "X-Replica"
_PROXYS_OWN = ("date", "server", "x-request-id")  # which Ray's proxy says itself


class Pieces:
    """The pieces of one answer as they come; whatever ends them early is a `Lost`."""

    def __init__(self, generator: Any) -> None:
        self._generator, self._ended = generator, generator is None

    async def next(self) -> Head | Lost | bytes | None:
        """The next piece; None at the end."""
        try:
            piece: Head | Lost | bytes = await anext(self._generator)
            return piece
        except StopAsyncIteration:
            self._ended = True
            return None
        except (RayError, RayServeException) as error:
            self._ended = True
            return Lost("", type(error).__name__)

    async def rest(self, first: bytes | Head | Lost) -> bytes | Lost:
        """All that follows, in one piece."""
        pieces = [first]
        while (piece := await self.next()) is not None:
            if isinstance(piece, Lost):
                return piece
            pieces.append(piece)
        return b"".join(piece for piece in pieces if isinstance(piece, bytes))

    def close(self) -> None:
        """Nobody wants the rest."""
        if not self._ended:
            self._generator.cancel()


async def stream_of(first: Head | bytes, pieces: Pieces) -> AsyncIterator[bytes]:
    """The body of a stream that has begun; with an error event at its end if it breaks off."""
    try:
        piece: Head | Lost | bytes | None = first
        while piece is not None:
            if isinstance(piece, Lost):
                logger.warning("A stream has lost its replica: %s", piece.why)
                yield error_event(piece.why)
                return
            if isinstance(piece, bytes):
                yield piece
            piece = await pieces.next()
    finally:
        pieces.close()


def put_headers(response: Response, head: Head) -> None:
    """Give a response the headers that the replica's server gave, and the replica's name."""
    stated = [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in head.headers
        if name not in _PROXYS_OWN
    ]
    names = {name for name, _ in stated}
    kept = [pair for pair in response.raw_headers if pair[0] not in names]
    replica = (REPLICA_HEADER.lower().encode(), head.replica.encode())
    response.raw_headers = [*kept, *stated, replica]
