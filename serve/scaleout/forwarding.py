"""What goes from the gateway to a replica and back, and what of it may pass. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from serve.openai_errors import ApiError

Headers = tuple[tuple[str, str], ...]

# RFC 9110, 7.6.1: these belong to one connection. The length is the server's to say anew.
_OF_ONE_CONNECTION = (
    *("connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    *("content-length", "host"),
)
STREAM_TYPE = "text/event-stream"
LOST = "replica_lost"


@dataclass(frozen=True, kw_only=True)
class Addressed:
    """What goes to one replica. `version` is the digest that decides which, None for what any can take.

    `to`: this replica and no other; `avoid`: it was just tried there.
    """

    version: str | None = None
    to: str | None = None
    avoid: str | None = None


@dataclass(frozen=True)
class Forwarded(Addressed):
    """One request."""

    method: str
    target: str  # path and query, as they came
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Head:
    """The first piece of an answer; its body follows in pieces of bytes."""

    status: int
    headers: Headers
    replica: str

    @property
    def is_stream(self) -> bool:
        """Whether the body comes event by event."""
        return any(name == "content-type" and value.startswith(STREAM_TYPE) for name, value in self.headers)


@dataclass(frozen=True)
class Lost:
    """In place of a piece: the replica's server is gone, or does not take this request."""

    replica: str
    why: str


def passed_on(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """The headers that go on to the next connection, with names in lower case."""
    pairs = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]
    stated = {
        part.strip().lower() for name, value in pairs if name == "connection" for part in value.split(",")
    }
    return tuple(pair for pair in pairs if pair[0] not in _OF_ONE_CONNECTION and pair[0] not in stated)


def error_event(why: str) -> bytes:
    """What a stream that had begun gets last: an event with OpenAI's error object, and the end of streams."""
    message = (
        f"The replica that answered this request is gone ({why}). What came before is not the whole answer."
    )
    error = ApiError(502, message, LOST, "server_error")
    return b"data: " + json.dumps(error.body()).encode() + b"\n\ndata: [DONE]\n\n"


def lost_error(why: str) -> ApiError:
    """For a request that was lost on its second replica as well."""
    message = f"Two replicas were lost while they worked on this request ({why}). Try again."
    return ApiError(502, message, LOST, "server_error", headers={"Retry-After": "1"})
