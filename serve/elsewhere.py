"""Adapters that vLLM's own resolvers find by name: they are admitted and published like all others."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Sequence
from typing import Any

from serve.admin import Admin
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import VllmLoraError
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.sources import stated_module
from vllm_lora_ext.spec import printable

logger = logging.getLogger("vllm.vllm_lora")

_LOOK_AGAIN_S = 10.0
_KEPT = 1024


class Elsewhere:
    """Asks vLLM's resolvers (`LoRAResolver.resolve_lora`) for names that the catalog does not have."""

    def __init__(
        self, resolvers: Sequence[Any], base: str, admin: Admin, base_names: Collection[str]
    ) -> None:
        self._resolvers, self._base, self._admin, self._base_names = resolvers, base, admin, base_names
        self._asked: dict[str, float] = {}
        self._one_at_a_time = asyncio.Lock()

    async def find(self, name: str) -> bool:
        """Whether the name is served now. A name is judged before anybody looks for it on a disk."""
        if judge_name(name, self._base_names):
            return False
        async with self._one_at_a_time:
            if self._admin.has(name):  # who asked at the same time has found it
                return True
            now = time.monotonic()
            if now - self._asked.get(name, -_LOOK_AGAIN_S) < _LOOK_AGAIN_S:
                return False
            if len(self._asked) >= _KEPT:
                self._asked.clear()
            self._asked[name] = now
            for resolver in self._resolvers:
                if await self._published(resolver, name):
                    del self._asked[name]
                    return True
        return False

    async def _published(self, resolver: Any, name: str) -> bool:
        try:
            request = await resolver.resolve_lora(self._base, name)
            if request is None:
                return False
            await self._admin.publish_folder(stated_module(name, request.lora_path, {}), True, ChatOverride())
        except VllmLoraError as error:
            logger.warning("Adapter %s was found by %s and is refused: %s", printable(name), resolver, error)
            return False
        except Exception:  # a resolver may be anybody's
            logger.exception("%s could not look for %s", resolver, printable(name))
            return False
        return True
