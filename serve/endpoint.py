"""The part of vllm-lora that lives inside vLLM's own OpenAI server (group `vllm.endpoint_plugins`).

It loads the adapters one by one, so that one that fails stops nobody else,
renders each adapter's chats with the adapter's own template, and answers
`GET /ready`.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.errors import BadBaseModel, ServerFailed
from vllm_lora_ext.inspection import inspect_adapter
from vllm_lora_ext.spec import EngineLimits

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.renderers.online_renderer import OnlineRenderer

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")


class AdapterEndpoint:
    """Implements vLLM's `EndpointPlugin` protocol (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_lora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.modules: Sequence[LoRAModulePath] = ()
        self.templates: dict[str, str] = {}

    def attach_router(self, app: FastAPI) -> None:
        """Add `/ready`, and take the adapters over from vLLM, which would stop at the first that fails."""
        args: Namespace = app.state.args
        self.modules, args.lora_modules = args.lora_modules or (), None

        @app.get("/ready")
        async def ready() -> JSONResponse:
            return await _readiness(app.state)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Load the adapters and bind their templates; called once the engine is up.

        Raises:
            ServerFailed: with --strict, when an adapter cannot be loaded.
        """
        if engine_client is None:
            return
        failed = [module.name for module in self.modules if not await self._load(module, state, args)]
        if failed and getattr(args, "strict", False):
            raise ServerFailed(", ".join(failed), "could not be loaded", "Start without --strict.")
        if self.templates:
            render_with_own_template(state.online_renderer, self.templates)
        served = list(state.openai_serving_models.lora_requests)
        logger.info(
            "Ready with base model %s and %d adapters: %s",
            state.openai_serving_models.model_name(),
            len(served),
            ", ".join(served) or "none",
        )

    async def _load(self, module: LoRAModulePath, state: State, args: Namespace) -> bool:
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        if Path(module.path).is_dir() and not self._admit(module, state, args):
            return False
        request = LoadLoRAAdapterRequest(
            lora_name=module.name,
            lora_path=module.path,
            is_3d_lora_weight=module.is_3d_lora_weight,
        )
        outcome = await state.openai_serving_models.load_lora_adapter(
            request, base_model_name=module.base_model_name
        )
        if isinstance(outcome, ErrorResponse):
            self.templates.pop(module.name, None)
            logger.error("Adapter %s was not loaded: %s", module.name, outcome.error.message)
            return False
        return True

    def _admit(self, module: LoRAModulePath, state: State, args: Namespace) -> bool:
        """Judge the adapter against the running engine's limits, and remember its template."""
        config = state.vllm_config.lora_config
        try:
            base = read_base_model(args.model)
        except BadBaseModel:
            base = None  # an unusual source of the base; names and shapes stay unproven
        inspection = inspect_adapter(Path(module.path), base, module.name, EngineLimits(config.max_lora_rank))
        if not inspection.admitted:
            reasons = "; ".join(str(finding) for finding in inspection.findings)
            logger.error("Adapter %s is refused: %s", module.name, reasons)
            return False
        template = template_to_use(inspection.chat, args.chat_template)
        if template is not None:
            self.templates[module.name] = template
        return True


def template_to_use(chat: ChatSettings, stated: str | None) -> str | None:
    """The adapter's own template, or None for the server's.

    A template that the user states with --chat-template wins over one that
    nobody vouches for, and gives way to the one an adapter was trained with:
    with any other the adapter would not do what it learned.
    """
    return None if stated and not chat.trained else chat.template


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


async def _readiness(state: State) -> JSONResponse:
    """200 while the engine works, 503 with the cause once it does not."""
    try:
        await state.engine_client.check_health()
    except Exception as error:  # whatever ended the engine, the answer is the same
        return JSONResponse({"status": "failed", "cause": type(error).__name__}, status_code=503)
    models = state.openai_serving_models
    return JSONResponse(
        {
            "status": "ready",
            "base_model": models.model_name(),
            "adapters": sorted(models.lora_requests),
        }
    )
