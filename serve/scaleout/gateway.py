"""The gateway: the address of the fleet. Keys, routes and changes are its own; answers are the replicas'.

What a request is allowed is decided here by the same code as on one machine; each replica's server decides it
once more. A request that a replica lost before anything of its answer went out is sent to another replica,
once; an answer that comes in one piece goes out once it is whole. A stream that had begun ends with an error
event.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import json
import logging
import tempfile
import uuid
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from serve.incoming import read_body
from serve.openai_errors import ApiError
from serve.routes import RouteKind, Routes
from serve.scaleout.changes import Change, change_of
from serve.scaleout.coalescing import in_pieces_of
from serve.scaleout.controller import Answer, Plan, Status
from serve.scaleout.copies import PIECE_BYTES, Copy, FromController
from serve.scaleout.followed import FollowedCatalog
from serve.scaleout.forwarding import Forwarded, Head, Lost, lost_error, passed_on
from serve.scaleout.merging import merged_adapter, merged_adapters, merged_metrics
from serve.scaleout.pieces import Pieces, put_headers, stream_of
from serve.scaleout.settings import FleetSettings
from vllm_lora_ext.errors import VllmLoraError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

_LOOK_EVERY_S = 0.5
_MAX_BODY_BYTES = 64 << 20
_FROM_ALL_WITHIN_S = 30.0
_KEPT_BY_ONE = "/v1/responses/"  # and its name follows


class Gateway:
    """See the module. Ray Serve's HTTP proxy calls it for each request."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: FleetSettings, controller: DeploymentHandle, engine: DeploymentHandle
    ) -> None:
        self._controller, self._engine = controller, engine.options(stream=True)
        plan: Plan = await controller.plan.remote()
        self._plan, self._routes = plan, Routes(plan.front.allow_route)
        state_dir = plan.state_dir
        if settings.replica_state_dir is not None:
            self._folder = tempfile.TemporaryDirectory(prefix="vllm-lora-gateway-")
            state_dir = Path(self._folder.name)
            self._copy = Copy(state_dir, FromController(controller), versions=False)
            await asyncio.to_thread(self._copy.start)
        self._catalog = FollowedCatalog(state_dir)
        self._status: Status = await controller.status.remote()
        self._looking = asyncio.create_task(self._look())

    def __del__(self) -> None:
        """Called by Ray at the end, which comes too suddenly for the folder's own way."""
        if hasattr(self, "_copy"):
            self._copy.stop()
            self._folder.cleanup()

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(RayError, RayServeException, TimeoutError):
                told: Status = await asyncio.wait_for(self._controller.status.remote(), 5.0)
                known = self._status.members if not told.is_settled else ()
                self._status = replace(told, members=tuple(sorted({*told.members, *known})))

    async def __call__(self, request: Request) -> Response:
        """One request."""
        try:
            return await self._answer(request)
        except ApiError as error:
            return _failed(error)
        except ClientDisconnect:  # nobody reads this
            return PlainTextResponse("", status_code=499)

    async def _answer(self, request: Request) -> Response:
        method, path = request.method, request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        kind = self._routes.kind(method, path)
        if kind is None:
            raise self._routes.closed(method, path)
        if (error := self._plan.front.keys.check(kind, request.headers.raw)) is not None:
            raise error
        if path == "/health":
            return PlainTextResponse("")
        if kind is RouteKind.ADMIN_CHANGE and method != "OPTIONS":
            return await self._change(change_of(method, path), request)
        if not self._status.members:
            headers = {"Retry-After": "1"}
            raise ApiError(503, "No replica is ready.", "starting", "server_error", headers=headers)
        if path.rstrip("/") == "/metrics":
            pages = await self._from_all(request)
            texts = {name: body.decode() for name, (head, body) in pages.items() if head.status == 200}
            return PlainTextResponse(merged_metrics(texts), media_type="text/plain; version=0.0.4")
        if kind is RouteKind.ADMIN_READ:
            return await self._adapters(path, request)
        if path.startswith(_KEPT_BY_ONE):
            return await self._first_that_knows(request)
        return await self._forward(await self._forwarded(request, kind))

    # Requests for models, and all else that any replica can answer.

    async def _forwarded(self, request: Request, kind: RouteKind) -> Forwarded:
        body = await _read(request)
        version = self._version_of(body) if kind is RouteKind.MODEL else None
        headers = passed_on(request.headers.raw)
        return Forwarded(request.method, _target(request), headers, body, version=version)

    def _version_of(self, raw: bytes) -> str | None:
        """The digest that decides where a request goes; None for the base, and for what replicas refuse.

        A name whose traffic is split goes where its live version lies, so all its versions lie there.
        """
        try:
            model = read_body(raw).get("model")
            if not isinstance(model, str) or model in self._plan.base_names:
                return None
            name, separator, digest = model.partition("@")
            return self._catalog.resolve(name, digest if separator else None).digest
        except (ApiError, VllmLoraError):
            self._refuse_pending(raw)
            return None

    def _refuse_pending(self, raw: bytes) -> None:
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError):
            name = str(json.loads(raw).get("model")).partition("@")[0]
            if (why := self._status.pending.get(name)) is not None and name not in self._catalog.names():
                message = f"The model `{name}` is being loaded: {why.rstrip('.')}."
                headers = {"Retry-After": "1"}
                raise ApiError(503, message, "adapter_loading", "server_error", "model", headers)

    async def _forward(self, forwarded: Forwarded) -> Response:
        tried = await self._attempt(forwarded)
        if isinstance(tried, Lost):
            logger.warning("A request is sent to another replica: %s (%s)", tried.why, tried.replica)
            tried = await self._attempt(replace(forwarded, avoid=tried.replica))
            if isinstance(tried, Lost):
                raise lost_error(tried.why)
        return tried

    async def _attempt(self, forwarded: Forwarded) -> Response | Lost:
        """One replica's answer: a stream once its first event is there, all else once it is whole."""
        pieces = Pieces(self._engine.forward.remote(forwarded))
        try:
            head = await pieces.next()
            if not isinstance(head, Head):
                return head if isinstance(head, Lost) else Lost("", "it gave no answer")
            first = await pieces.next()
            if isinstance(first, Lost):
                return first
            if head.is_stream and first is not None:
                response: Response = StreamingResponse(stream_of(first, pieces), status_code=head.status)
                pieces = Pieces(None)  # it is the stream's now
            else:
                body = await pieces.rest(first or b"")
                if isinstance(body, Lost):
                    return body
                response = Response(body, status_code=head.status)
            put_headers(response, head)
            return response
        finally:
            pieces.close()

    # What concerns all replicas.

    async def _from_all(self, request: Request) -> dict[str, tuple[Head, bytes]]:
        """The answers of all replicas that give one in time."""
        target, headers = _target(request), passed_on(request.headers.raw)
        method, members = request.method, self._status.members
        # In contexts of their own: calls within one request of Ray's share its number, and would wait.
        tasks = [
            asyncio.create_task(self._from_one(method, target, headers, name), context=contextvars.Context())
            for name in members
        ]
        return {head.replica: (head, body) for head, body in filter(None, await asyncio.gather(*tasks))}

    async def _from_one(self, method: str, target: str, headers: Any, name: str) -> tuple[Head, bytes] | None:
        pieces = Pieces(self._engine.forward.remote(Forwarded(method, target, headers, b"", to=name)))
        try:
            async with asyncio.timeout(_FROM_ALL_WITHIN_S):
                head = await pieces.next()
                body = await pieces.rest(b"")
        except TimeoutError:
            return None
        finally:
            pieces.close()
        return (head, body) if isinstance(head, Head) and isinstance(body, bytes) else None

    async def _first_that_knows(self, request: Request) -> Response:
        """The answer of the one replica that keeps a response; else what the others say of it."""
        answers = sorted((await self._from_all(request)).values(), key=lambda answer: answer[0].status)
        if not answers:
            raise ApiError(503, "No replica answers.", "starting", "server_error")
        head, body = answers[0]
        response = Response(body, status_code=head.status)
        put_headers(response, head)
        return response

    async def _adapters(self, path: str, request: Request) -> Response:
        answers = list((await self._from_all(request)).values())
        bodies = [json.loads(body) for head, body in answers if head.status == 200]
        if bodies:
            return JSONResponse(merged_adapters(bodies) if path == "/v1/adapters" else merged_adapter(bodies))
        if not answers:
            raise ApiError(503, "No replica answers.", "starting", "server_error")
        head, body = answers[0]
        return Response(body, status_code=head.status, media_type="application/json")

    # Changes.

    async def _change(self, change: Change, request: Request) -> Response:
        body = await _json(request) if change.verb in ("rollback", "traffic") else {}
        try:
            if change.verb == "publish":
                return _answered(await self._publish(change.name, request))
            return _answered(await self._changed(change, body))
        except (RayError, RayServeException) as error:
            logger.exception("A change got no answer")
            message = "The controller has ended meanwhile, so it is not known what became of the change."
            raise ApiError(503, message, "controller_lost", "server_error") from error

    async def _changed(self, change: Change, body: Mapping[str, Any]) -> Answer:
        work: Awaitable[Answer]
        if change.verb == "rollback":
            work = self._controller.rollback.remote(change.name, change.to_of(body))
        elif change.verb == "traffic":
            work = self._controller.split.remote(change.name, change.percent_of(body))
        else:
            work = self._controller.remove.remote(change.name)
        answer: Answer = await work
        return answer

    async def _publish(self, name: str, request: Request) -> Answer:
        """Send the archive to the controller piece by piece, for it to take."""
        replaces = request.query_params.get("replace", "false") in ("true", "1")
        stated = request.headers.get("X-Chat-Settings")
        chat = read_body(stated.encode("latin-1")) if stated else {}
        number = uuid.uuid4().hex
        try:
            async for piece in in_pieces_of(PIECE_BYTES, request.stream()):
                failed: Answer | None = await self._controller.upload.remote(number, piece)
                if failed is not None:
                    return failed
            answer: Answer = await self._controller.publish.remote(name, number, replaces, chat)
            return answer
        finally:
            self._controller.forget.remote(number)


def _target(request: Request) -> str:
    path = request.scope.get("raw_path") or request.scope["path"].encode()
    query = request.scope.get("query_string", b"")
    target: bytes = path + (b"?" + query if query else b"")
    return target.decode("latin-1")


async def _read(request: Request, most: int = _MAX_BODY_BYTES) -> bytes:
    pieces, size = [], 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise ApiError(
                413, f"The body of the request has more than {most >> 20} MiB.", "request_too_large"
            )
    return b"".join(pieces)


async def _json(request: Request) -> dict[str, Any]:
    raw = await _read(request, 1 << 20)
    return read_body(raw) if raw else {}


def _answered(answer: Answer) -> Response:
    return JSONResponse(answer.body, status_code=answer.status, headers=dict(answer.headers))


def _failed(error: ApiError) -> Response:
    return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))
