"""The server follows the catalog: what is live there is loaded here, from the store and nowhere else."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.admission import refused
from vllm_lora_ext.background import lower_priority
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.contract import template_to_use
from vllm_lora_ext.errors import StoreFailed, VllmLoraError
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.intake import admit
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.publishing import judge_published
from vllm_lora_ext.records import Entry
from vllm_lora_ext.sources import fetched, stated_module
from vllm_lora_ext.store import AdapterStore, StoredVersion

if TYPE_CHECKING:
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.entrypoints.serve.lora.protocol import (
        LoadLoRAAdapterRequest,
        UnloadLoRAAdapterRequest,
    )
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("vllm.vllm_lora")

_LOOK_EVERY_S = 0.5
_INTAKE_THREADS = 2


class StoreGate:
    """Stands in front of vLLM's own loading: whatever is to be loaded is admitted into the store first.

    `templates` are the chat templates of what is loaded, by name. Every loaded version is leased, so
    that nobody collects it.
    """

    def __init__(
        self, models: OpenAIServingModels, store: AdapterStore, rules: Rules, args: Namespace
    ) -> None:
        self.store, self.rules = store, rules
        self.templates: dict[str, str] = {}
        self._stated_template: str | None = args.chat_template
        self._load, self._unload = models.load_lora_adapter, models.unload_lora_adapter
        self._leases: dict[str, ExitStack] = {}
        self._threads = ThreadPoolExecutor(_INTAKE_THREADS, "adapter-intake", initializer=lower_priority)
        models.load_lora_adapter = self.load_lora_adapter
        models.unload_lora_adapter = self.unload_lora_adapter
        models.lora_resolvers = [_GuardedResolver(resolver, self) for resolver in models.lora_resolvers]

    async def load_lora_adapter(
        self, request: LoadLoRAAdapterRequest, base_model_name: str | None = None
    ) -> ErrorResponse | str:
        """In place of vLLM's: what lies at the path is judged, and its stored version is loaded."""
        from vllm.entrypoints.serve import create_error_response

        try:
            version, trained = await self.admitted(request.lora_name, request.lora_path)
            return await self.load_version(request.lora_name, version, trained, request, base_model_name)
        except StoreFailed as error:
            logger.error("Adapter %s was not stored: %s", request.lora_name, error)
            return create_error_response(f"{request.lora_name} could not be stored: {error.rule}")
        except VllmLoraError as error:
            return create_error_response(str(error))

    async def load_version(
        self,
        name: str,
        version: StoredVersion,
        trained: bool,
        request: LoadLoRAAdapterRequest,
        base_model_name: str | None,
    ) -> ErrorResponse | str:
        """Load a version of the store under `name`."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        stored = request.model_copy(update={"lora_name": name, "lora_path": str(version.folder)})
        with self.store.lease(version.digest):
            version.release()
            outcome = await self._load(stored, base_model_name)
            if isinstance(outcome, ErrorResponse):
                outcome.error.message = outcome.error.message.replace(str(version.folder), "its folder")
                return outcome
            self.keep(name, version, trained)
        return outcome

    def keep(self, name: str, version: StoredVersion, trained: bool) -> None:
        """Lease the version that `name` stands for, and render its chats by its own template.

        Raises:
            VersionMissing: it was collected.
        """
        lease = ExitStack()
        lease.enter_context(self.store.lease(version.digest))
        version.release()
        self._release(name)
        self._leases[name] = lease
        template = template_to_use(replace(version.chat, trained=trained), self._stated_template)
        if template is not None:
            self.templates[name] = template

    async def unload_lora_adapter(self, request: UnloadLoRAAdapterRequest) -> ErrorResponse | str:
        """As vLLM's; the version may be collected from then on."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        outcome = await self._unload(request)
        if not isinstance(outcome, ErrorResponse):
            self._release(request.lora_name)
        return outcome

    async def admitted(self, name: str, path: str) -> tuple[StoredVersion, bool]:
        """The stored version of what lies at `path`, and whether its template is vouched for.

        Raises:
            AdapterRefused, BadInput, StoreFailed: it may not be served, or cannot be had.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._admit, name, path)

    def _admit(self, name: str, path: str) -> tuple[StoredVersion, bool]:
        with fetched(stated_module(name, path, {}), self.store.root.parent / "incoming") as folder:
            admitted = admit(folder, self.store, self.rules, name)
        return admitted.version, admitted.inspection.chat.trained

    def _release(self, name: str) -> None:
        self.templates.pop(name, None)
        if (lease := self._leases.pop(name, None)) is not None:
            lease.close()


class _GuardedResolver:
    """A resolver of vLLM's that finds adapters by name: the name is judged, and what it finds is admitted."""

    def __init__(self, resolver: Any, gate: StoreGate) -> None:
        self._resolver, self._gate = resolver, gate

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for a stored version; None if there is no such adapter, or it may not be served."""
        if judge_name(lora_name, self._gate.rules.base_names):
            return None
        request = await self._resolver.resolve_lora(base_model_name, lora_name)
        if request is None:
            return None
        try:
            version, trained = await self._gate.admitted(lora_name, request.lora_path)
            self._gate.keep(lora_name, version, trained)
        except VllmLoraError as error:
            logger.warning("Adapter %s was found by %s and is refused: %s", lora_name, self._resolver, error)
            return None
        request.lora_path = str(version.folder)
        return request


class CatalogFollower:
    """Loads what is live in the catalog, now and as it comes."""

    def __init__(self, catalog: Catalog, gate: StoreGate, models: OpenAIServingModels) -> None:
        self._catalog, self._gate, self._models = catalog, gate, models
        self._tried: dict[str, str] = {}  # name -> the version that was tried last
        self.failed: list[str] = []

    async def load_new(self) -> None:
        """Load every name that is live and not loaded. After a failure only another version is tried."""
        for entry in self._catalog.entries():
            if entry.name in self._models.lora_requests or self._tried.get(entry.name) == entry.live:
                continue
            self._tried[entry.name] = entry.live
            if reason := await self._load(entry):
                logger.error("Adapter %s was not loaded: %s", entry.name, reason)
                self.failed.append(entry.name)

    async def follow(self) -> None:
        """Look for changes until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                if self._catalog.refresh():
                    await self.load_new()
            except Exception:  # a flaw must not leave the server blind to what is published
                logger.exception("The catalog cannot be followed")

    async def _load(self, entry: Entry) -> str | None:
        """Why it could not be loaded, None if it is."""
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        version = entry.live_version
        findings = judge_published(entry.name, version, self._catalog, self._gate.rules)
        if refused(findings):
            return "; ".join(map(str, findings))
        try:
            stored = self._catalog.store.open(version.digest)
            request = LoadLoRAAdapterRequest(
                lora_name=entry.name,
                lora_path=str(stored.folder),
                is_3d_lora_weight=bool(version.options.get("is_3d_lora_weight")),
            )
            outcome = await self._gate.load_version(
                entry.name,
                stored,
                version.template == "trained",
                request,
                version.options.get("base_model_name"),
            )
        except VllmLoraError as error:
            return str(error)
        return outcome.error.message if isinstance(outcome, ErrorResponse) else None
