"""A version as it is served: what the catalog and the store say of it, together."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.records import Version
from vllm_lora_ext.store import StoredVersion


@dataclass(frozen=True)
class ServedVersion:
    """`template` is the chat template to render with, None for the server's own."""

    name: str
    version: Version
    stored: StoredVersion
    template: str | None

    @property
    def model(self) -> str:
        """What the engine knows it by, and answers carry as their `model`: `name@3f2a9c14d0b7`."""
        return f"{self.name}@{self.version.short}"

    @property
    def chat(self) -> ChatSettings:
        """How it wants to be asked."""
        return self.stored.chat
