"""The routes that are ours: `/ready`, `/v1/models`, `/v1/adapters`, and vLLM's load and unload, made safe.

FastAPI reads the annotations of its handlers when they are defined, so they are not postponed here.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from serve.adapter_view import finding_data
from serve.admin import Admin
from serve.front import Desk
from serve.incoming import read_body
from serve.live import LiveAdapters
from serve.openai_errors import ApiError
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import (
    AdapterExists,
    AdapterRefused,
    AdapterUnknown,
    BadInput,
    StateLocked,
    StoreFailed,
    VllmLoraError,
)

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

_MAX_JSON_BYTES = 1 << 20
CHAT_HEADER = "X-Chat-Settings"
_NAME_CODES = ("adapter_name_invalid", "adapter_name_reserved")
_Handler = Callable[[], Awaitable[Any]]


def attach_routes(app: "FastAPI", desk: Desk, readiness: Callable[[], Awaitable[tuple[int, Any]]]) -> None:
    """Put our routes into vLLM's app, in the place of its own where there are any."""
    _attach_models(app, desk, readiness)
    _attach_adapters(app, desk)
    _attach_vllms(app, desk)


def _attach_models(app: "FastAPI", desk: Desk, readiness: Callable[[], Awaitable[tuple[int, Any]]]) -> None:
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response

    @app.get("/ready")
    async def ready(request: Request) -> Response:
        status, body = await readiness()
        return JSONResponse(body, status_code=status)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        return await _answer(lambda: _done(models(_live(desk), desk)))

    @app.get("/v1/models/{model:path}")
    async def show_model(request: Request, model: str) -> Response:
        return await _answer(lambda: _done(one_model(_live(desk), desk, model)))


def _attach_adapters(app: "FastAPI", desk: Desk) -> None:
    from starlette.requests import Request
    from starlette.responses import Response

    @app.get("/v1/adapters")
    async def list_adapters(request: Request) -> Response:
        return await _answer(lambda: _done(_admin(desk).list()))

    @app.post("/v1/adapters/{name:path}/rollback")
    async def rollback(request: Request, name: str) -> Response:
        async def work() -> Any:
            to = (await _json(request)).get("to")
            return await _admin(desk).rollback(name, None if to is None else _text(to, "to"))

        return await _answer(work)

    @app.put("/v1/adapters/{name:path}/traffic")
    async def split(request: Request, name: str) -> Response:
        async def work() -> Any:
            return await _admin(desk).split(name, _percents((await _json(request)).get("traffic")))

        return await _answer(work)

    @app.get("/v1/adapters/{name:path}")
    async def show_adapter(request: Request, name: str) -> Response:
        return await _answer(lambda: _done(_admin(desk).get(name)))

    @app.put("/v1/adapters/{name:path}")
    async def publish(request: Request, name: str) -> Response:
        async def work() -> Any:
            replaces = request.query_params.get("replace", "false") in ("true", "1")
            stated = request.headers.get(CHAT_HEADER)
            chat = ChatOverride.from_json(read_body(stated.encode("latin-1"))) if stated else ChatOverride()
            return await _admin(desk).publish(name, request.stream(), replaces, chat)

        return await _answer(work)

    @app.delete("/v1/adapters/{name:path}")
    async def remove(request: Request, name: str) -> Response:
        return await _answer(lambda: _admin(desk).remove(name))


def _attach_vllms(app: "FastAPI", desk: Desk) -> None:
    """Requests, answers and status codes are vLLM's; what is loaded is admitted and published first."""
    from starlette.requests import Request
    from starlette.responses import Response

    @app.post("/v1/load_lora_adapter")
    async def load_lora_adapter(request: Request) -> Response:
        async def work() -> Any:
            body = await _json(request)
            name, path = _text(body.get("lora_name"), "lora_name"), _text(body.get("lora_path"), "lora_path")
            await _admin(desk).load(name, path, body.get("load_inplace") is True)
            return f"Success: LoRA adapter '{name}' added successfully."

        return await _answer(work, as_vllm=True)

    @app.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(request: Request) -> Response:
        async def work() -> Any:
            name = _text((await _json(request)).get("lora_name"), "lora_name")
            await _admin(desk).unload(name)
            return f"Success: LoRA adapter '{name}' removed successfully."

        return await _answer(work, as_vllm=True)


def models(live: LiveAdapters, desk: Desk) -> dict[str, Any]:
    """OpenAI's list of models: the base under each of its names, and every adapter that is served."""
    cards = [_card(live, desk, name, None) for name in live.rules.base_names]
    cards += [_card(live, desk, name, _version_of(live, name)) for name in live.names()]
    return {"object": "list", "data": cards}


def one_model(live: LiveAdapters, desk: Desk, model: str) -> dict[str, Any]:
    """OpenAI's model object. Raises ApiError for one that is not served."""
    model = unquote(model)
    version = live.resolve(model)
    return _card(live, desk, model, None if version is None else version.version.short)


def _version_of(live: LiveAdapters, name: str) -> str:
    assert live.catalog is not None
    return live.catalog.entry(name).live_version.short


def _card(live: LiveAdapters, desk: Desk, name: str, version: str | None) -> dict[str, Any]:
    card = {
        "id": name,
        "object": "model",
        "created": desk.started_at,
        "owned_by": "vllm-lora",
        "root": name if version is None else f"{name.partition('@')[0]}@{version}",
        "parent": None if version is None else live.base_name,
        "max_model_len": desk.max_model_len,
    }
    return card if version is None else {**card, "version": version}


async def _answer(work: _Handler, as_vllm: bool = False) -> "Response":
    """What `work` gives as JSON, or its error as OpenAI's error object.

    vLLM's own routes answer in plain text, and every error of the client's with 400 or 404.
    """
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, PlainTextResponse

    try:
        body = await work()
        return PlainTextResponse(body) if isinstance(body, str) else JSONResponse(body)
    except ClientDisconnect:  # nobody reads this
        return PlainTextResponse("", status_code=499)
    except ApiError as error:
        failure, findings = error, None
    except VllmLoraError as error:
        failure = api_error(error)
        findings = [finding_data(f) for f in error.findings] if isinstance(error, AdapterRefused) else None
    if as_vllm and failure.status in (409, 422):
        failure.status = 400
    content: dict[str, Any] = failure.body()
    if findings is not None:
        content["error"] = {**content["error"], "findings": findings}
    return JSONResponse(content, status_code=failure.status, headers=dict(failure.headers))


def api_error(error: VllmLoraError) -> ApiError:
    """An error of ours as clients of the server see it."""
    if isinstance(error, AdapterExists):
        return ApiError(409, str(error), "adapter_exists")
    if isinstance(error, AdapterRefused):
        codes = [finding.code for finding in error.findings]
        if codes and all(code in _NAME_CODES for code in codes):
            return ApiError(400, str(error), codes[0], param="name")
        param = error.findings[0].item if error.findings else None
        return ApiError(422, str(error), "adapter_refused", param=param)
    if isinstance(error, AdapterUnknown):
        return ApiError(404, str(error), "adapter_unknown")
    if isinstance(error, StoreFailed):
        return ApiError(507, f"It could not be stored: {error.rule}.", "store_failed", "server_error")
    if isinstance(error, StateLocked):  # it names the folder
        return ApiError(503, f"The state folder {error.rule}.", "state_locked", "server_error")
    if isinstance(error, BadInput):
        return ApiError(400, str(error), "invalid_value")
    return ApiError(500, str(error), "adapter_failed", "server_error")


async def _done(body: Any) -> Any:
    return body


def _live(desk: Desk) -> LiveAdapters:
    if desk.live is None:
        raise ApiError(
            503, "The server is starting.", "starting", "server_error", headers={"Retry-After": "1"}
        )
    return desk.live


def _admin(desk: Desk) -> Admin:
    _live(desk)
    if desk.admin is None:
        message = "This server was started without adapters. Start it with --adapters DIR."
        raise ApiError(404, message, "no_adapters")
    return desk.admin


async def _json(request: "Request") -> dict[str, Any]:
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > _MAX_JSON_BYTES:
            raise ApiError(413, "The body of the request is too large.", "request_too_large")
    return read_body(raw) if raw else {}


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name}: must be a text.", "invalid_value", param=name)
    return value


def _percents(value: object) -> Mapping[str, int]:
    if not isinstance(value, dict) or not all(type(share) is int for share in value.values()):
        message = (
            "traffic: must give each version, by the beginning of its digest, a whole number of percent."
        )
        raise ApiError(400, message, "invalid_value", param="traffic")
    return value
