"""The front: every HTTP request passes here before vLLM sees it.

Closed routes, missing keys, unknown models and full queues are answered here. What passes names its
version, holds a lease on it, and carries what the adapter wants.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from serve.admin import Admin
from serve.drain import Drain
from serve.from_source import source_decides
from serve.gate import Adapter, QueueFull
from serve.incoming import read_body, refuse_templates, user_of, with_chat_settings
from serve.keys import Keys
from serve.live import LiveAdapters
from serve.manager import Manager
from serve.metrics import Metrics
from serve.openai_errors import ApiError
from serve.routes import RouteKind, Routes
from serve.served import ServedVersion
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.errors import VllmLoraError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_MAX_BODY_BYTES = 64 << 20
_BODY_DEADLINE_S = 60.0
VERSION_HEADER = "X-Adapter-Version"


@dataclass
class Desk:
    """What the front and our routes work with; `live`, `manager` and `admin` come once the engine is up.

    `background` gives the tasks that go on after their response, see vLLM's responses. `started_at` is in
    seconds since 1970. `admin` stays None on a server without adapters. `find` looks for a name elsewhere.
    With `from_source` nobody changes adapters here. `base_stop` are the base's own stop strings, which a
    merged or wholly trained model has (`contract.stops_of_model`).
    """

    routes: Routes
    keys: Keys
    metrics: Metrics
    started_at: int
    live: LiveAdapters | None = None
    manager: Manager | None = None
    admin: Admin | None = None
    max_model_len: int | None = None
    from_source: bool = False
    base_stop: tuple[str, ...] = ()
    find: Callable[[str], Awaitable[bool]] | None = None
    background: Callable[[], Collection[asyncio.Task[Any]]] = tuple
    drain: Drain = field(default_factory=Drain)


class Front:
    """The ASGI middleware. See the module."""

    def __init__(self, app: App, desk: Desk) -> None:
        self._app, self._desk = app, desk
        self._accepted: Counter[Adapter] = Counter()  # requests that have not ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except _Refused as refusal:
            self._desk.metrics.refused(refusal.error.code)
            await send_error(send, refusal.error)
        except _Left:
            pass

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"].removeprefix(scope.get("root_path", ""))
        kind = self._desk.routes.kind(method, path)
        if kind is None:
            raise _Refused(self._desk.routes.closed(method, path))
        if kind is RouteKind.ADMIN_CHANGE and self._desk.from_source:
            raise _Refused(source_decides())
        if (error := self._desk.keys.check(kind, scope["headers"])) is not None:
            raise _Refused(error)
        if kind is RouteKind.ADMIN_CHANGE:
            with _refusing():
                self._desk.drain.check()
        if kind is RouteKind.MODEL:
            await self._ask_model(path, scope, receive, send)
        else:
            # With the slash vLLM renders all metrics in its event loop, which holds up every stream.
            scope = {**scope, "path": scope["path"][:-1]} if path == "/metrics/" else scope
            await self._app(scope, receive, send)

    async def _ask_model(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        raw = await read_all(scope, receive)
        live, manager, drain = self._desk.live, self._desk.manager, self._desk.drain
        with _refusing():
            body = read_body(raw)
            refuse_templates(body)
            if live is None or manager is None:
                headers = {"Retry-After": "1"}
                raise ApiError(503, "The server is starting.", "starting", "server_error", None, headers)
            version = await self._resolve(live, body)
            model = None if version is None else version.model
            drain.check()
            accept(live, manager, version, self._accepted[model], drain.accepted)
        with drain.request(), self._counted(model):
            if version is None:
                if self._desk.base_stop:
                    wanted = ChatSettings(stop=self._desk.base_stop)
                    raw = json.dumps(with_chat_settings(path, body, wanted, None)).encode()
                    scope = _with_length(scope, len(raw))
                await self._app(scope, _replayed(raw, receive), send)
                return
            try:
                body = with_chat_settings(path, body, version.chat, version.template)
                raw = json.dumps({**body, "model": version.model}).encode()
                scope, send = _with_length(scope, len(raw)), _stamped(send, version)
                await self._app(scope, _replayed(raw, receive), send)
            finally:
                self._let_go(manager, version, bool(body.get("background")))

    @contextmanager
    def _counted(self, model: Adapter) -> Iterator[None]:
        self._accepted[model] += 1
        try:
            yield
        finally:
            self._accepted[model] -= 1
            if not self._accepted[model]:
                del self._accepted[model]

    async def _resolve(self, live: LiveAdapters, body: dict[str, Any]) -> ServedVersion | None:
        model, user = body.get("model"), user_of(body)
        try:
            return live.resolve(model, user)
        except ApiError as error:
            if error.code != "model_not_found" or self._desk.find is None or not isinstance(model, str):
                raise
            if not await self._desk.find(model):
                raise
        return live.resolve(model, user)

    def _let_go(self, manager: Manager, version: ServedVersion, in_background: bool) -> None:
        """End the lease; that of a response which goes on in the background ends with it.

        Which of the tasks is this response's is not to be seen, so the lease lasts for all that run now.
        """
        tasks = [task for task in self._desk.background() if not task.done()] if in_background else []
        left = len(tasks)
        if not left:
            manager.release(version.model)

        def ended(_: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                manager.release(version.model)

        for task in tasks:
            task.add_done_callback(ended)


def accept(
    live: LiveAdapters,
    manager: Manager,
    version: ServedVersion | None,
    accepted: int = 0,
    accepted_in_all: int = 0,
) -> None:
    """Take a request on: from here it ends exactly once, by this version. For the counts see `Gate.check`.

    Raises:
        ApiError: 429, too many wait; 500, the store has lost the version.
    """
    try:
        model = None if version is None else version.model
        manager.gate.check(model, accepted, accepted_in_all)
        if version is not None:
            manager.hold(version)
    except QueueFull as full:
        headers = {"Retry-After": str(full.retry_after_s)}
        raise ApiError(429, f"Too many requests: {full}.", "queue_full", "requests", None, headers) from None
    except VllmLoraError as error:
        assert version is not None
        live.note_failure(version, str(error))
        raise ApiError(500, str(error), "adapter_failed", "server_error", "model") from None


class _Left(Exception):
    """Nobody is there to be answered."""


class _Refused(Exception):
    def __init__(self, error: ApiError) -> None:
        self.error = error
        super().__init__(str(error))


@contextmanager
def _refusing() -> Iterator[None]:
    """An ApiError inside it is the answer."""
    try:
        yield
    except ApiError as error:
        raise _Refused(error) from None


async def read_all(scope: Scope, receive: Receive) -> bytes:
    """The whole body of a request.

    Raises:
        _Refused: 413, it is too large; 408, it does not come.
        _Left: the client has gone.
    """
    pieces, size = [], 0
    try:
        async with asyncio.timeout(_BODY_DEADLINE_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Left
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > _MAX_BODY_BYTES:
                    text = f"The body of the request has more than {_MAX_BODY_BYTES >> 20} MiB."
                    raise _Refused(ApiError(413, text, "request_too_large"))
                if not message.get("more_body"):
                    return b"".join(pieces)
    except TimeoutError:
        text = f"The body of the request did not come within {_BODY_DEADLINE_S:.0f} s."
        raise _Refused(ApiError(408, text, "request_timeout")) from None


def _replayed(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which was read already, and then what else comes."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return again


def _with_length(scope: Scope, length: int) -> Scope:
    dropped = (b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


def _stamped(send: Send, version: ServedVersion) -> Send:
    """Names may be Chinese, headers may not: the header carries the version only."""
    header = (VERSION_HEADER.lower().encode(), version.version.short.encode())

    async def stamped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), header]}
        await send(message)

    return stamped


async def send_error(send: Send, error: ApiError) -> None:
    """Answer with an error object."""
    body = json.dumps(error.body(), ensure_ascii=False).encode("utf-8", "backslashreplace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
