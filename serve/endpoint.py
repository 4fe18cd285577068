"""The part of vllm-lora that lives inside vLLM's own OpenAI server (group `vllm.endpoint_plugins`).

It loads the adapters from the store, one by one, so that one that fails stops nobody
else, renders each adapter's chats with the adapter's own template, and answers `GET /ready`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.config import source_of
from serve.fleet import default_state_dir
from serve.following import CatalogFollower, StoreGate
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadBaseModel, ServerFailed
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.spec import EngineLimits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.renderers.online_renderer import OnlineRenderer

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")


class AdapterEndpoint:
    """Implements vLLM's `EndpointPlugin` protocol (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_lora"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.modules: Sequence[LoRAModulePath] = ()
        self.following: asyncio.Task[None] | None = None

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
        if engine_client is not None:
            remember_death(engine_client, args)
        if engine_client is None or state.vllm_config.lora_config is None:
            return
        await prove_engine(engine_client, state.vllm_config, args)
        models: OpenAIServingModels = state.openai_serving_models
        rules = rules_of(models, state.vllm_config.lora_config.max_lora_rank, args)
        catalog = await asyncio.to_thread(open_catalog, self.modules, rules, args)
        gate = StoreGate(models, catalog.store, rules, args)
        render_with_own_template(state.online_renderer, gate.templates)
        follower = CatalogFollower(catalog, gate, models)
        await follower.load_new()
        if follower.failed and getattr(args, "strict", False):
            raise ServerFailed(", ".join(follower.failed), "could not be loaded", "Start without --strict.")
        self.following = asyncio.create_task(follower.follow())
        served = ", ".join(models.lora_requests) or "none"
        count = len(models.lora_requests)
        logger.info("Ready with base model %s and %d adapters: %s", models.model_name(), count, served)


def rules_of(models: OpenAIServingModels, max_lora_rank: int, args: Namespace) -> Rules:
    """What the running server judges adapters by."""
    try:
        base = read_base_model(args.model)
    except BadBaseModel:
        base = None  # an unusual source of the base: names and shapes stay unproven
    base_names = tuple(path.name for path in models.base_model_paths)
    allow = frozenset(getattr(args, "allow", ()))
    return Rules(base, base_names, EngineLimits(max_lora_rank), allow)


def open_catalog(modules: Sequence[LoRAModulePath], rules: Rules, args: Namespace) -> Catalog:
    """The catalog that `vllm-lora serve` keeps; under plain vLLM one of our own with `--lora-modules` in it.

    Raises:
        StateLocked: under plain vLLM, another server works with the same adapters.
    """
    if getattr(args, "state_dir", None):
        return Catalog(Path(args.state_dir), readonly=True)
    sources = [source_of(module) for module in modules]
    if sources:
        state_dir = default_state_dir([source.path for source in sources])
    else:  # for adapters that are loaded at run time, which plain vLLM forgets
        state_dir = Path(tempfile.mkdtemp(prefix="vllm-lora-"))
        atexit.register(shutil.rmtree, state_dir, ignore_errors=True)
    catalog = Catalog(state_dir)
    inbox = Inbox(catalog, rules)
    inbox.take_all(inbox.scan(sources))
    return catalog


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
