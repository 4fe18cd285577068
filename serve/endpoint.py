"""The part of vllm-lora that lives inside vLLM's own OpenAI server (group `vllm.endpoint_plugins`).

It loads the adapters one by one, so that one that fails stops nobody else,
renders each adapter's chats with the adapter's own template, and answers
`GET /ready`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import template_to_use
from vllm_lora_ext.errors import BadBaseModel, ServerFailed
from vllm_lora_ext.inspection import inspect_adapter
from vllm_lora_ext.spec import EngineLimits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.lora.protocol import (
        LoadLoRAAdapterRequest,
        UnloadLoRAAdapterRequest,
    )
    from vllm.renderers.online_renderer import OnlineRenderer

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")


class AdapterEndpoint:
    """Implements vLLM's `EndpointPlugin` protocol (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_lora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.modules: Sequence[LoRAModulePath] = ()

    def attach_router(self, app: FastAPI) -> None:
        """Add `/ready`, and take the adapters over from vLLM, which would stop at the first that fails."""
        from fastapi.responses import JSONResponse

        args: Namespace = app.state.args
        self.modules, args.lora_modules = args.lora_modules or (), None

        @app.get("/ready")
        async def ready() -> JSONResponse:
            status, body = await readiness(app.state)
            return JSONResponse(body, status_code=status)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Load the adapters and bind their templates; called once the engine is up.

        Raises:
            ServerFailed: with --strict, when an adapter cannot be loaded.
        """
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        if engine_client is not None:
            remember_death(engine_client, args)
        if engine_client is None or state.vllm_config.lora_config is None:
            return
        await prove_engine(engine_client, state.vllm_config, args)
        models: OpenAIServingModels = state.openai_serving_models
        templates: dict[str, str] = {}
        guard_loading(models, templates, state.vllm_config.lora_config.max_lora_rank, args)
        render_with_own_template(state.online_renderer, templates)
        failed = []
        for module in self.modules:
            request = LoadLoRAAdapterRequest(
                lora_name=module.name,
                lora_path=module.path,
                is_3d_lora_weight=module.is_3d_lora_weight,
            )
            outcome = await models.load_lora_adapter(request, module.base_model_name)
            if isinstance(outcome, ErrorResponse):
                logger.error("Adapter %s was not loaded: %s", module.name, outcome.error.message)
                failed.append(module.name)
        if failed and getattr(args, "strict", False):
            raise ServerFailed(", ".join(failed), "could not be loaded", "Start without --strict.")
        served = ", ".join(models.lora_requests) or "none"
        count = len(models.lora_requests)
        logger.info("Ready with base model %s and %d adapters: %s", models.model_name(), count, served)


async def prove_engine(engine_client: EngineClient, vllm_config: Any, args: Namespace) -> None:
    """Before anybody is served: our parts are in every worker, and keep adapters apart.

    vLLM logs a plugin that cannot be imported and goes on without it, so somebody has to ask.

    Raises:
        ServerFailed: a worker runs without our parts.
        IsolationBroken: a row was answered with another row's adapter.
    """
    from vllm_lora_ext.engine.calls import prove_isolation, require_parts
    from vllm_lora_ext.engine.isolation import LEAD, Engine

    await require_parts(engine_client)
    if getattr(args, "no_isolation_check", False):
        return
    model, lora = vllm_config.model_config, vllm_config.lora_config
    linears = {}
    with contextlib.suppress(BadBaseModel):
        linears = read_base_model(args.model).module_shapes() or {}
    if lora.target_modules is not None:
        linears = {
            name: shape for name, shape in linears.items() if name.endswith(tuple(lora.target_modules))
        }
    engine = Engine(
        engine_client, model.get_vocab_size(), lora.max_loras, str(model.dtype) == "torch.float16", linears
    )
    started = time.monotonic()
    lead = await prove_isolation(engine)
    if lead is not None:
        seconds = time.monotonic() - started
        logger.info("Isolation check: adapters and base do not mix (lead %.0f, %.1f s)", lead, seconds)
        if lead < LEAD:
            logger.warning("Isolation check: this model's weights allow no lead of %.0f", LEAD)


def remember_death(engine_client: EngineClient, args: Namespace) -> None:
    """Note in `args.engine_died` whether the engine was dead before it was told to stop.

    vLLM ends its server then as if it had been asked to, and afterwards both look alike.
    """
    upstream = engine_client.shutdown

    def shutdown(*positional: Any, **named: Any) -> Any:
        if not hasattr(args, "engine_died"):  # it is called more than once
            args.engine_died = engine_client.errored
        return upstream(*positional, **named)

    engine_client.shutdown = shutdown


def guard_loading(
    models: OpenAIServingModels, templates: dict[str, str], max_lora_rank: int, args: Namespace
) -> None:
    """Judge every adapter before vLLM loads it, now or later; `templates` follows what is loaded."""
    from vllm.entrypoints.serve import create_error_response
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    load, unload = models.load_lora_adapter, models.unload_lora_adapter
    limits = EngineLimits(max_lora_rank)
    base_names = [path.name for path in models.base_model_paths]
    try:
        base = read_base_model(args.model)
    except BadBaseModel:
        base = None  # an unusual source of the base: names and shapes stay unproven

    async def load_lora_adapter(
        request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        folder, template = Path(request.lora_path), None
        if folder.is_dir():
            inspection = inspect_adapter(folder, base, request.lora_name, limits, base_names)
            if not inspection.admitted:
                return create_error_response("; ".join(map(str, inspection.findings)))
            template = template_to_use(inspection.chat, args.chat_template)
        outcome = await load(request, base_model_name)
        if not isinstance(outcome, ErrorResponse):
            templates.pop(request.lora_name, None)
            if template is not None:
                templates[request.lora_name] = template
        return outcome

    async def unload_lora_adapter(request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        outcome = await unload(request)
        if not isinstance(outcome, ErrorResponse):
            templates.pop(request.lora_name, None)
        return outcome

    models.load_lora_adapter = load_lora_adapter
    models.unload_lora_adapter = unload_lora_adapter


def render_with_own_template(renderer: OnlineRenderer, templates: dict[str, str]) -> None:
    """Make every chat route (chat, responses, messages, tokenize) render `model`'s own template.

    They all go through `preprocess_chat`, whose `default_template` is used
    unless the request brings a template of its own.
    """
    upstream = renderer.preprocess_chat

    async def preprocess_chat(request: Any, messages: list[Any], **kwargs: Any) -> Any:
        own = templates.get(getattr(request, "model", None) or "")
        if own is not None:
            kwargs["default_template"] = own
        return await upstream(request, messages, **kwargs)

    renderer.preprocess_chat = preprocess_chat


async def readiness(state: State) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of `/ready`: 200 while the engine works, 503 with the cause once it does not."""
    try:
        await state.engine_client.check_health()
    except Exception as error:  # whatever ended the engine, the answer is the same
        return 503, {"status": "failed", "cause": type(error).__name__}
    models = state.openai_serving_models
    return 200, {
        "status": "ready",
        "base_model": models.model_name(),
        "adapters": sorted(models.lora_requests),
    }
