"""The adapters of a state folder, worked on without a server."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.adapter_view import adapter_detail, adapter_view, kept_proofs, removed_view
from serve.fleet import agreed_base_model
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.catalog import KEEP_VERSIONS, Catalog
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import BadBaseModel, BadSetting, StateLocked
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import judge_published, publish
from vllm_lora_ext.records import Entry
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.spec import Finding
from vllm_lora_ext.state_file import owner


@dataclass(frozen=True)
class DiskAdapters:
    """The adapters of `state_dir`; see `serve.versions.Adapters`.

    What is published is judged by `base_model`, by default the one that the state folder is for, and `allow`.
    """

    state_dir: Path
    base_model: str | None = None
    allow: frozenset[str] = frozenset()
    keep_versions: int = KEEP_VERSIONS

    def list(self) -> Sequence[dict[str, Any]]:
        """All that are published."""
        with self._reading() as catalog:
            proofs = kept_proofs(catalog)
            return [
                adapter_view(entry, _findings(entry, catalog), proofs=proofs) for entry in catalog.entries()
            ]

    def get(self, name: str) -> dict[str, Any]:
        """One with its versions."""
        with self._reading() as catalog:
            entry = catalog.entry(name)
            return adapter_detail(entry, _findings(entry, catalog), catalog)

    def verify(self, name: str) -> None:
        """Compare every byte of the live version with its digest.

        Raises:
            VersionMissing, VersionDamaged: it is not as it was written.
        """
        with self._reading() as catalog:
            catalog.store.verify(catalog.entry(name).live)

    def publish(self, source: AdapterSource, replace: bool, chat: ChatOverride) -> dict[str, Any]:
        """Judge an adapter and make it the live version of its name."""
        with _unlocked(self.state_dir), Catalog(self.state_dir, keep_versions=self.keep_versions) as catalog:
            base = self._base_of(source, catalog)
            rules = Rules(base, (base.public_name,) if base else (), allow=self.allow)
            entry, inspection = publish(source, catalog, rules, replace, chat)
            if base is not None and not catalog.base():
                catalog.note_base(base.name, base.fingerprint)
            return adapter_view(entry, inspection.findings, proofs=kept_proofs(catalog))

    def rollback(self, name: str, to: str | None) -> dict[str, Any]:
        """Make an earlier version live."""
        with self._changing() as catalog:
            catalog.rollback(name, to)
            return _view(name, catalog)

    def traffic(self, name: str, percent: Mapping[str, int]) -> dict[str, Any]:
        """Split the requests over versions."""
        with self._changing() as catalog:
            catalog.set_traffic(name, percent)
            return _view(name, catalog)

    def remove(self, names: Collection[str]) -> Sequence[dict[str, Any]]:
        """Take names out of service, all of them or, if one is unknown, none."""
        with self._changing() as catalog:
            catalog.remove(names)
            catalog.collect()
            return [removed_view(name) for name in names]

    @contextmanager
    def _reading(self) -> Iterator[Catalog]:
        self._require_folder()
        with Catalog(self.state_dir, readonly=True) as catalog:
            yield catalog

    @contextmanager
    def _changing(self) -> Iterator[Catalog]:
        self._require_folder()
        with _unlocked(self.state_dir), Catalog(self.state_dir) as catalog:
            yield catalog

    def _require_folder(self) -> None:
        if not self.state_dir.is_dir():
            fix = "The server prints which when it starts."
            raise BadSetting(str(self.state_dir), "no such state folder", fix)

    def _base_of(self, source: AdapterSource, catalog: Catalog) -> BaseModel | None:
        """The base to judge by: the stated one, the one that the state folder is for, the adapter's own."""
        known = catalog.base()
        if self.base_model or known:
            base = read_base_model(self.base_model or known["name"])
            if known and base.fingerprint != known["fingerprint"]:
                fix = "Choose another --state-dir: one is for one base model."
                raise BadSetting(
                    base.public_name, f"is not the base of this state folder, {known['name']}", fix
                )
            return base
        try:
            return read_base_model(agreed_base_model([source]))
        except (BadBaseModel, BadSetting):
            return None


@contextmanager
def _unlocked(state_dir: Path) -> Iterator[None]:
    """A server that works here is the one to ask."""
    try:
        yield
    except StateLocked as error:
        _, _, url = owner(state_dir).partition(" at ")
        if not url:
            raise
        fix = f"Ask it: --url {url} in place of --state-dir."
        raise StateLocked(error.item, error.rule, fix) from error


def _findings(entry: Entry, catalog: Catalog) -> list[Finding]:
    return judge_published(entry.name, entry.live_version, catalog, Rules())


def _view(name: str, catalog: Catalog) -> dict[str, Any]:
    entry = catalog.entry(name)
    return adapter_view(entry, _findings(entry, catalog), proofs=kept_proofs(catalog))
