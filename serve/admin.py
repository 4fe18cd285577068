"""What `/v1/adapters` does: list, show, publish, roll back, split, remove, on a server that goes on serving.

A change is on the disk before it is acknowledged. A version goes live only after the engine has loaded
it, so one that the engine cannot take leaves the live one as it was.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from serve.adapter_view import LiveFacts, adapter_detail, adapter_view, removed_view, unpublished_view
from serve.live import LiveAdapters
from serve.manager import Manager
from serve.metrics import public_name
from serve.proving import Prover
from vllm_lora_ext.archive import Unpacker
from vllm_lora_ext.background import lower_priority
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import AdapterRefused, AdapterUnknown, BadSetting, StoreFailed
from vllm_lora_ext.inbox import version_of
from vllm_lora_ext.intake import admit
from vllm_lora_ext.names import ascii_shown, judge_name
from vllm_lora_ext.peft_format import MAX_WEIGHTS_BYTES
from vllm_lora_ext.records import Entry, Version
from vllm_lora_ext.sources import AdapterSource, fetched
from vllm_lora_ext.spec import Finding, Severity

_THREADS = 2
_MAX_ARCHIVE_BYTES = MAX_WEIGHTS_BYTES + (64 << 20)
_Result = TypeVar("_Result")


class Folders(Protocol):
    """What is known of the watched folders."""

    def pending(self) -> Mapping[str, str]:
        """Names that are being looked at, with what is missing."""

    def incomplete(self) -> Mapping[str, str]:
        """Names that have been incomplete for long, with what is missing."""


@dataclass(frozen=True)
class NoFolders:
    """Nothing is watched."""

    def pending(self) -> Mapping[str, str]:
        """None."""
        return {}

    def incomplete(self) -> Mapping[str, str]:
        """None."""
        return {}


class Admin:
    """The changes, one method each; every one raises the errors of `vllm_lora_ext.errors`.

    `roots` are the folders that `/v1/load_lora_adapter` may name a path in.
    """

    def __init__(
        self,
        live: LiveAdapters,
        manager: Manager,
        folders: Folders,
        roots: Sequence[Path] = (),
        prover: Prover | None = None,
    ) -> None:
        assert live.catalog is not None
        self._prover = prover
        self._live, self._manager, self._folders = live, manager, folders
        self._catalog: Catalog = live.catalog
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._threads = ThreadPoolExecutor(_THREADS, "adapter-admin", initializer=lower_priority)

    # Looking.

    def list(self) -> dict[str, Any]:
        """Every name, served or not."""
        refusals = self._refusals()
        rows = {entry.name: self._view(entry, refusals) for entry in self._catalog.entries()}
        for name, findings in refusals.items():
            rows.setdefault(name, unpublished_view(name, "refused", findings))
        for name, why in self._folders.incomplete().items():
            rows.setdefault(name, unpublished_view(name, "incomplete", [_note("incomplete", name, why)]))
        for name, why in self._folders.pending().items():
            rows.setdefault(name, unpublished_view(name, "loading", [_note("adapter_loading", name, why)]))
        return {"object": "list", "data": [rows[name] for name in sorted(rows)]}

    def has(self, name: str) -> bool:
        """Whether there is an adapter of that name."""
        return name in self._catalog.names()

    def get(self, name: str) -> dict[str, Any]:
        """One name with its versions, what happened to it, and how it wants to be asked."""
        if name not in self._catalog.names():
            for row in self.list()["data"]:
                if row["id"] == name:
                    return {**row, "versions": [], "history": []}
        entry = self._catalog.entry(name)
        findings = self._findings(entry, self._refusals())
        facts, rules = self._facts(entry), self._live.rules
        return adapter_detail(entry, findings, self._catalog, facts, rules, self._proof)

    def _refusals(self) -> dict[str, tuple[Finding, ...]]:
        """Why folders were refused, by name; the name may be served all the same, in an earlier version."""
        folders = self._catalog.folders().values()
        return {record.name: record.findings for record in folders if record.findings}

    def _findings(self, entry: Entry, refusals: Mapping[str, Sequence[Finding]]) -> Sequence[Finding]:
        return self._live.findings(entry) or refusals.get(entry.name, ())

    def _view(self, entry: Entry, refusals: Mapping[str, Sequence[Finding]] | None = None) -> dict[str, Any]:
        known = self._refusals() if refusals is None else refusals
        return adapter_view(entry, self._findings(entry, known), self._facts(entry), self._proof)

    def _proof(self, digest: str) -> Mapping[str, Any]:
        return {} if self._prover is None else self._prover.record(digest)

    def _facts(self, entry: Entry) -> LiveFacts:
        gate, use = self._manager.gate, self._manager.use_of(entry.name)
        models = {version.digest: f"{entry.name}@{version.short}" for version in entry.versions}
        counts = [gate.counts(model) for model in models.values()]
        state = gate.state_of(models[entry.live])
        return LiveFacts(
            state=None if self._live.findings(entry) else state,
            requests=use.requests,
            running=sum(running for running, _ in counts),
            waiting=sum(waiting for _, waiting in counts),
            last_used=use.last_used,
            load_seconds=use.load_seconds,
            resident_versions=frozenset(d for d, model in models.items() if gate.state_of(model) != "stored"),
        )

    # Changing.

    async def publish(
        self, name: str, archive: AsyncIterator[bytes], replaces: bool, chat: ChatOverride
    ) -> dict[str, Any]:
        """Take an adapter that somebody sends, and make it the live version of `name`."""
        if findings := judge_name(name, self._live.rules.base_names):
            raise AdapterRefused(ascii_shown(name), findings)
        try:
            self._catalog.incoming.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._catalog.incoming))
        except OSError as error:
            raise StoreFailed(name, error) from error
        try:
            unpacker = Unpacker(folder, _MAX_ARCHIVE_BYTES)
            async for piece in archive:
                await self._in_thread(partial(unpacker.feed, piece))
            await self._in_thread(unpacker.close)
            return await self.publish_folder(AdapterSource(name, str(folder)), replaces, chat, "upload")
        except OSError as error:
            raise StoreFailed(name, error) from error
        finally:
            await self._in_thread(lambda: shutil.rmtree(folder, ignore_errors=True))

    async def publish_folder(
        self, source: AdapterSource, replaces: bool, chat: ChatOverride, origin: str | None = None
    ) -> dict[str, Any]:
        """Judge what lies in a folder, have the engine load it, and make it live; nothing changes before.

        With --require-proof it is proved in between, and refused if it is not proven.
        """
        rules = replace(self._live.rules, follow_links=origin is None)

        def take() -> Any:
            with fetched(source, self._catalog.incoming) as folder:
                return admit(folder, self._catalog.store, rules, source.name, chat=chat)

        admitted = await self._in_thread(take)
        try:
            version = version_of(admitted, self._catalog, rules, source)
            version = version if origin is None else replace(version, source=origin)
            served = self._live.served(source.name, version)
            await self._manager.prove(served)
            self._live.note_success(served)
            try:
                await self._require_proof(source.name, version)
                await self._in_thread(lambda: self._catalog.publish(source.name, version, replaces))
            except BaseException:
                await self._manager.dismiss(served.model)
                raise
        finally:
            admitted.version.release()
            await self._in_thread(self._catalog.collect)
        if self._prover is not None:
            await self._prover.save()
        self._live.refresh()
        return self._view(self._catalog.entry(source.name))

    async def try_load(self, name: str, version: Version) -> None:
        """Whether the engine can load a version of the store, which leaves its memory if no name has it.

        Raises:
            AdapterFailed, VersionMissing, VersionDamaged: it cannot.
            AdapterRefused: with --require-proof, it is not proven.
        """
        served = self._live.served(name, version)
        await self._manager.prove(served)
        self._live.note_success(served)
        await self._require_proof(name, version)
        if not self._has_version(name, version.digest):
            await self._manager.dismiss(served.model)

    def _has_version(self, name: str, digest: str) -> bool:
        return self.has(name) and any(of.digest == digest for of in self._catalog.entry(name).versions)

    async def rollback(self, name: str, to: str | None) -> dict[str, Any]:
        """Make an earlier version live again."""
        entry = self._catalog.entry(name)
        if (digest := entry.find(to).digest if to is not None else entry.previous()) is not None:
            await self._require_proof(name, entry.find(digest))
        await self._in_thread(lambda: self._catalog.rollback(name, to))
        self._live.refresh()
        return self._view(self._catalog.entry(name))

    async def split(self, name: str, percent: Mapping[str, int]) -> dict[str, Any]:
        """Split a name's requests over its versions."""
        entry = self._catalog.entry(name)
        for digest, share in percent.items():
            if share > 0:
                await self._require_proof(name, entry.find(digest))
        await self._in_thread(lambda: self._catalog.set_traffic(name, percent))
        self._live.refresh()
        return self._view(self._catalog.entry(name))

    async def remove(self, name: str) -> dict[str, Any]:
        """Take a name out of service; what runs finishes."""
        await self._in_thread(lambda: self._catalog.remove([name]))
        self._live.refresh()
        self._manager.forget_use(name)
        await self._in_thread(self._catalog.collect)
        return removed_view(name)

    async def load(self, name: str, path: str, replaces: bool) -> None:
        """As vLLM's `/v1/load_lora_adapter`: publish what lies at `path`, within the adapters folder."""
        if findings := judge_name(name, self._live.rules.base_names):
            raise AdapterRefused(ascii_shown(name), findings)
        real = Path(os.path.realpath(path.replace("\0", "")))  # with that sign no path can be asked for
        if not any(real != root and real.is_relative_to(root) for root in self._roots):
            rule = "is not within the adapters folder of this server"
            raise BadSetting("lora_path", rule, "Put the adapter there, or send it: `vllm-lora publish DIR`.")
        if name in self._catalog.names() and not replaces:
            rule = "has already been loaded"
            raise BadSetting(name, rule, "Set load_inplace to replace what it stands for.")
        await self.publish_folder(AdapterSource(name, str(real)), True, ChatOverride())

    async def unload(self, name: str) -> None:
        """As vLLM's `/v1/unload_lora_adapter`."""
        if public_name(name) not in self._catalog.names():
            raise AdapterUnknown(ascii_shown(name), "cannot be found", "`vllm-lora ls` lists what is there.")
        await self.remove(name)

    async def _require_proof(self, name: str, version: Version) -> None:
        """With --require-proof: refuse what is not proven on this engine; the live version stays."""
        if self._prover is not None and self._prover.required:
            await self._prover.require(self._live.served(name, version))

    async def _in_thread(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _note(code: str, name: str, why: str) -> Finding:
    return Finding(code, name, why, "", Severity.WARNING)
