"""The controller's side of a trial: which replica is asked, and what its answer means.

Only what an engine says of the version counts. A replica that is lost meanwhile says nothing, and the next
one is asked; where there is none, at the start of a fleet, a version is admitted as it is, and its first
request finds out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve.scaleout.forwarding import Lost
from serve.scaleout.placement import order_of
from serve.scaleout.settings import ENGINE
from serve.scaleout.trial import Trial, Trouble
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.records import Version
from vllm_lora_ext.spec import Finding, printable

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

_PATIENCE_S = 600.0  # for a large adapter, a slow disk and a busy engine; then the next replica is asked


class Trials:
    """`members` are the replicas that take part, by name. Nobody is asked before `begin`."""

    def __init__(self, members: Callable[[float], Sequence[str]]) -> None:
        self._members = members
        self._loop: asyncio.AbstractEventLoop | None = None
        self._engine: DeploymentHandle | None = None

    def begin(self) -> None:
        """The first replica is there; called in the event loop of the controller."""
        self._loop = self._loop or asyncio.get_running_loop()

    async def require(self, name: str, version: Version) -> None:
        """Return once one engine has loaded the version, or no replica could say.

        Raises:
            VllmLoraError: as one server says it: an engine cannot load it, or it is not proven.
        """
        if (trouble := await self._trouble(name, version)) is not None:
            raise trouble.error()

    def check(self, name: str, version: Version) -> None:
        """The same for the threads that take folders.

        Raises:
            AdapterRefused: an engine cannot load it, or with --require-proof, it is not proven.
        """
        if self._loop is None:
            return
        trouble = asyncio.run_coroutine_threadsafe(self._trouble(name, version), self._loop).result()
        if trouble is not None and trouble.findings:
            raise trouble.error()
        if trouble is not None:
            item = f"{printable(name)}@{version.short}"
            rule = f"is refused by the engine ({trouble.rule})"
            raise AdapterRefused(name, [Finding("load_failed", item, rule, "Publish another version.")])

    async def _trouble(self, name: str, version: Version) -> Trouble | None:
        members = tuple(self._members(time.monotonic()))
        for replica in order_of(version.digest, members):  # first the one that it will lie on
            try:
                said = await asyncio.wait_for(self._ask(Trial(name, version, to=replica)), _PATIENCE_S)
            except (RayError, RayServeException, TimeoutError) as error:
                said = Lost(replica, type(error).__name__)
            if not isinstance(said, Lost):
                return said
            logger.warning("%s was not tried by replica %s: %s", printable(name), replica, said.why)
        return None

    async def _ask(self, trial: Trial) -> Trouble | Lost | None:
        engine: Any = self._engine or await asyncio.to_thread(serve.get_deployment_handle, ENGINE)
        self._engine = engine
        said: Trouble | Lost | None = await engine.try_version.remote(trial)
        return said
