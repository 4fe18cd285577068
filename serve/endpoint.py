"""The part of vllm-lora that lives inside vLLM's own OpenAI server (group `vllm.endpoint_plugins`).

Here the parts of the front side are put together: the catalog and what follows from it, the manager and
the engine, the middleware and the routes.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import logging
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.adapter_view import judged_badly
from serve.admin import Admin, Folders, NoFolders
from serve.admin_routes import attach_routes
from serve.config import FrontSettings, front_settings, source_of
from serve.elsewhere import Elsewhere
from serve.fleet import default_state_dir
from serve.front import Desk, Front
from serve.gate import Limits
from serve.live import LiveAdapters
from serve.manager import Manager
from serve.metrics import Metrics
from serve.preload import preload
from serve.proof_gate import ProofGate
from serve.proving import Place, Prover
from serve.routes import Routes
from serve.turns import TurnTaker
from serve.vllm_engine import (
    VllmEngine,
    base_mark,
    drain_before_shutdown,
    engine_mark,
    generation_error,
    prove_engine,
    remember_death,
    render_with_own_template,
    show_one_series,
)
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.contract import stops_of_model
from vllm_lora_ext.errors import AdapterRefused, BadBaseModel, BadSetting, ServerFailed
from vllm_lora_ext.inbox import Inbox
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.spec import EngineLimits

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

# A child of vLLM's logger, so that its handler and format apply.
logger = logging.getLogger("vllm.vllm_lora")

_LOOK_EVERY_S = 0.5
_LOOKS_PER_COLLECT = 60  # half a minute: what a change took out of the store's use is out of the memory then


class AdapterEndpoint:
    """Implements vLLM's `EndpointPlugin` protocol (vllm/plugins/endpoint_plugins/interface.py)."""

    name = "vllm_lora"
    required_tasks = (
        "generate",
        "embed",
        "classify",
        "token_embed",
        "token_classify",
        "embed&token_classify",
    )

    def __init__(self) -> None:
        self.modules: Sequence[LoRAModulePath] = ()
        self.looking: asyncio.Task[None] | None = None
        self.preloading: asyncio.Task[None] | None = None
        self.proving: asyncio.Task[None] | None = None
        self.also: object = None  # what else of ours works with the adapters in this process, to be kept
        self.settings: FrontSettings
        self.desk: Desk

    def attach_router(self, app: FastAPI) -> None:
        """Put our middleware and routes in front of vLLM's, and take keys and adapters over from it.

        Its own check of keys would run before ours and guards some paths only; its loading would stop at
        the first adapter that fails.
        """
        args: Namespace = app.state.args
        self.modules, args.lora_modules = args.lora_modules or (), None
        self.settings = getattr(args, "vllm_lora_front", None) or front_settings(args)
        base_names = args.served_model_name or [args.model]
        names = [base_names] if isinstance(base_names, str) else list(base_names)
        metrics = Metrics(self.settings.metrics_max_adapters, base_names=names)
        self.desk = Desk(Routes(self.settings.allow_route), self.settings.keys, metrics, int(time.time()))
        self.desk.from_source = self.settings.catalog_from_source
        self.desk.base_stop = stops_of_model(args.model)
        app.add_middleware(Front, desk=self.desk)
        if not any(getattr(route, "path", "") == "/v1/chat/completions" for route in app.routes):
            # A pooling model renders chats where we cannot give a default, so the adapter's template goes
            # into the body. A client's own never gets so far.
            args.trust_request_chat_template = True
        attach_routes(app, self.desk, lambda: readiness(app.state, self.desk))

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Check the engine, put the parts together, and load the first adapters; called once it is up.

        Raises:
            ServerFailed: with --strict, when an adapter cannot be loaded; with several API servers.
            AdapterRefused: with --strict and --require-proof, when one is not proven.
        """
        if engine_client is None:
            return
        if (args.api_server_count or 1) > 1:
            fix = "Start it with --api-server-count 1."
            raise ServerFailed("--api-server-count", "one server has to own what is loaded", fix)
        drain_before_shutdown(engine_client, self.desk.drain, asyncio.get_running_loop())
        remember_death(engine_client, args)
        models: OpenAIServingModels = state.openai_serving_models
        lora = state.vllm_config.lora_config
        catalog, folders = None, getattr(args, "vllm_lora_folders", NoFolders())
        rules = rules_of(models, lora.max_lora_rank if lora else 0, args)
        if lora is not None:
            await prove_engine(engine_client, state.vllm_config, args)
            catalog = getattr(args, "vllm_lora_catalog", None)
            catalog = catalog or await asyncio.to_thread(open_catalog, self.modules, rules, args)
        engine = VllmEngine(engine_client, models)
        self._wire(engine, catalog, folders, rules, state, args)
        if self._prover is not None:
            await self._prove_first(self._prover, args, lora.max_loras)
        await self._load_first(args, lora.max_loras if lora else 0)
        render_with_own_template(state.online_renderer, engine.templates)
        turns = TurnTaker(self._manager, self.desk.metrics, models.model_name(), generation_error)
        engine_client.generate = turns.wrap(engine_client.generate)
        engine_client.encode = turns.wrap(engine_client.encode)
        if lora is not None:
            show_one_series(engine_client, lora.max_loras)
        self.looking = asyncio.create_task(self._look())
        if self.desk.admin is not None and (also := getattr(args, "vllm_lora_also", None)) is not None:
            self.also = await also(self.desk.admin)
        if self.settings.preload:
            self.preloading = asyncio.create_task(preload(self._live, self._manager))
        if self._prover is not None:
            self.proving = asyncio.create_task(self._prover.run())
        names = self._live.names()
        served = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "") if names else "none"
        logger.info("Ready with base model %s and %d adapters: %s", models.model_name(), len(names), served)

    def _wire(
        self,
        engine: VllmEngine,
        catalog: Catalog | None,
        folders: Folders,
        rules: Rules,
        state: State,
        args: Namespace,
    ) -> None:
        settings, config = self.settings, state.vllm_config
        live = self._live = LiveAdapters(
            catalog,
            rules,
            args.chat_template,
            folders.pending,
            lambda model: self._manager.retire(model),
            missing=lambda name, version: self._prover.missing(name, version) if self._prover else None,
        )
        manager = self._manager = Manager(
            engine,
            catalog.store if catalog else None,
            limits_of(config, settings),
            self.desk.metrics,
            live.note_failure,
        )
        self._prover = make_prover(engine, live, manager, config, settings.require_proof)
        if catalog is not None:
            roots = roots_of(self.modules, args)
            self.desk.admin = Admin(live, manager, folders, roots, self._prover)
            if engine.resolvers and not settings.catalog_from_source:
                base = config.model_config.model
                self.desk.find = Elsewhere(engine.resolvers, base, self.desk.admin, rules.base_names).find
        self.desk.max_model_len = config.model_config.max_model_len
        responses = getattr(state, "openai_serving_responses", None)
        if responses is not None:
            self.desk.background = lambda: list(responses.background_tasks.values())
        self.desk.manager, self.desk.live = manager, live

    async def _prove_first(self, prover: Prover, args: Namespace, slots: int) -> None:
        """With --require-proof: what fits the slots before anybody asks, with --strict everything.

        The rest follows while the server serves, and answers 503 until then.
        """
        gate: ProofGate | None = getattr(args, "vllm_lora_proofs", None)
        strict = getattr(args, "strict", False)
        if gate is not None:
            gate.open(prover.require_of, asyncio.get_running_loop())
        if not prover.required:
            return
        await prover.prove_live(None if strict else slots)
        first = self._live.pending().keys() if strict else ()
        while any(name in self._live.pending() for name in first):  # they come through the gate
            await asyncio.sleep(_LOOK_EVERY_S)
        refused = prover.refused() if strict else []
        if refused:
            raise AdapterRefused(", ".join(finding.item for finding in refused), refused)

    async def _load_first(self, args: Namespace, slots: int) -> None:
        """What fits the slots is loaded before anybody asks; with --strict everything has to load once."""
        live, strict = self._live, getattr(args, "strict", False)
        names = live.names() if slots else []
        versions = [live.resolve(name) for name in (names if strict else names[:slots])]
        failed = await self._manager.warm_up([version for version in versions if version is not None])
        if failed and strict:
            raise ServerFailed(", ".join(failed), "could not be loaded", "Start without --strict.")

    async def _look(self) -> None:
        """Now and then: what left the catalog leaves memory and store, and the gauges are set."""
        catalog, collected, judged = self._live.catalog, -1, -1
        for number in itertools.count():
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                self._live.refresh()
                if catalog is not None and number % _LOOKS_PER_COLLECT == 0 and collected != catalog.revision:
                    collected = catalog.revision
                    await asyncio.to_thread(catalog.collect)
                if catalog is not None and judged != catalog.revision:
                    judged = catalog.revision
                    self.desk.metrics.judged(*judged_badly(catalog))
                gate, (slots, cached) = self._manager.gate, self._manager.memory()
                stored = len(catalog.names()) if catalog is not None else 0
                self.desk.metrics.adapters(slots, cached - slots, max(0, stored - cached))
                self.desk.metrics.requests(gate.running, gate.waiting)
            except Exception:  # a flaw must not leave the server blind
                logger.exception("The catalog cannot be followed")


def make_prover(
    engine: VllmEngine, live: LiveAdapters, manager: Manager, config: Any, required: bool
) -> Prover | None:
    """What proves adapters on this engine; None where there are none, or where it generates nothing.

    Raises:
        BadSetting: proofs are required of a model that generates nothing.
    """
    model = config.model_config
    if live.catalog is None:
        return None
    if model.runner_type != "generate":
        if required:
            raise BadSetting("--require-proof", "needs a model that generates text", "Leave it out.")
        return None
    place = Place(
        base=base_mark(model.model),
        engine=engine_mark(),
        dtype=str(model.dtype).removeprefix("torch."),
        quantised=config.quant_config is not None or "fp8" in str(config.cache_config.cache_dtype),
    )
    return Prover(live, manager, engine.scorer(model), place, required)


def limits_of(config: Any, settings: FrontSettings) -> Limits:
    """What the engine takes; a few requests more than it runs, so that it never waits for the next one."""
    running = config.scheduler_config.max_num_seqs
    slots, cached = 0, 0
    if config.lora_config is not None:
        slots = config.lora_config.max_loras
        cached = max(slots, config.lora_config.max_cpu_loras or 0)
    return Limits(
        slots=slots,
        cached=cached,
        running=running + max(2, running // 8),
        queue_per_adapter=settings.max_queue_per_adapter,
        queue_total=settings.max_queue,
        turn_s=settings.turn_seconds,
    )


def rules_of(models: OpenAIServingModels, max_lora_rank: int, args: Namespace) -> Rules:
    """What the running server judges adapters by."""
    try:
        base = read_base_model(args.model)
    except BadBaseModel:
        base = None  # an unusual source of the base: names and shapes stay unproven
    base_names = tuple(path.name for path in models.base_model_paths)
    allow = frozenset(getattr(args, "allow", ()))
    return Rules(base, base_names, EngineLimits(max_lora_rank), allow)


def roots_of(modules: Sequence[LoRAModulePath], args: Namespace) -> list[Path]:
    """The folders that `/v1/load_lora_adapter` may name a path in."""
    roots = list(getattr(args, "vllm_lora_roots", ()))
    roots += [Path(source_of(module).path).expanduser().parent for module in modules]
    resolved = os.environ.get("VLLM_LORA_RESOLVER_CACHE_DIR")
    return [*roots, *([Path(resolved)] if resolved else [])]


def open_catalog(modules: Sequence[LoRAModulePath], rules: Rules, args: Namespace) -> Catalog:
    """Under plain vLLM, a catalog of our own with `--lora-modules` in it.

    Raises:
        StateLocked: another server works with the same adapters.
    """
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


async def readiness(state: State, desk: Desk) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of `/ready`: 200 while the engine works and new requests are let in, else 503."""
    if desk.drain.stopping:
        return 503, {"status": "stopping", "cause": "SIGTERM or SIGINT", "requests": desk.drain.accepted}
    try:
        await state.engine_client.check_health()
    except Exception as error:  # whatever ended the engine, the answer is the same
        return 503, {"status": "failed", "cause": type(error).__name__}
    if desk.live is None:
        return 503, {"status": "starting"}
    return 200, {"status": "ready", "base_model": desk.live.base_name, "adapters": desk.live.names()}
