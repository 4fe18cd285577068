"""A replica: an actor that runs `vllm-lora serve` as its child on a loopback port, and forwards to it.

The child is a whole server, so a request meets the same front side here as on one machine. The actor adds
what a server alone cannot know: that its names are those of the controller (it reports the revision that the
child goes by), and that nobody is answered once it cannot report.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from ray import serve
from ray.exceptions import RayError

from serve.process import ServerProcess
from serve.scaleout.coalescing import coalesced
from serve.scaleout.copies import Copy, FromController, own_folder
from serve.scaleout.forwarding import Forwarded, Head, Lost, passed_on
from serve.scaleout.membership import REPORT_EVERY_S, Fence
from serve.scaleout.settings import CONTROLLER, REVISION_FILE, TRIAL_SOCKET, FleetSettings
from serve.scaleout.trial import Trial, Trouble, ask_for_trial
from vllm_lora_ext.errors import VllmLoraError

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

CHILD = (sys.executable, "-P", "-m", "serve.scaleout.child")
_LOOK_EVERY_S = 0.05
_LAST_WORDS_S = 0.3  # for requests that are being told that their server is gone
_Piece = Head | Lost | bytes


class Replica:
    """See the module. Ray Serve makes one for each replica, and calls `forward` for each request."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, settings: FleetSettings, controller: DeploymentHandle
    ) -> None:
        self._controller = controller
        self.name = serve.get_replica_context().replica_id.unique_id
        plan = await controller.plan.remote()
        self._app = serve.get_replica_context().app_name
        self._copy = None
        state_dir = plan.state_dir
        if settings.replica_state_dir is not None:
            state_dir, self._lock = own_folder(settings.replica_state_dir)
            self._copy = Copy(state_dir, FromController(controller))
            await asyncio.to_thread(self._copy.start)
        self._folder = Path(tempfile.mkdtemp(prefix="vllm-lora-replica-"))
        self._revision_file = self._folder / REVISION_FILE
        log = self._folder / "server.log"
        command = (*CHILD, str(self._folder))
        self._child = ServerProcess(
            (*plan.child_flags, "--state-dir", str(state_dir)),
            log,
            command=command,
            ready_timeout_s=settings.start_timeout_s,
        )
        logger.info("Replica %s starts its server; its log is %s", self.name, log)
        try:
            await asyncio.to_thread(self._child.__enter__)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)  # the error has the log's last lines
            raise
        self._client = httpx2.AsyncClient(
            base_url=self._child.url,
            timeout=httpx2.Timeout(None, connect=5.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,
        )
        self._client.headers.clear()  # what the client of the fleet did not say is not said for it
        self._fence = Fence(time.monotonic())
        self._reported_at = 0.0
        self._gone = ""
        await self._report(self._revision())
        works = (self._keep_reporting(), self._keep_looking(), self._watch_child())
        self._tasks = [asyncio.create_task(work) for work in works]

    async def forward(self, request: Forwarded) -> AsyncIterator[_Piece]:
        """The answer of this replica's server: its head, its body as it comes, `Lost` if it breaks off."""
        if why := self._why_not():
            yield Lost(self.name, why)
            return
        try:
            async with self._client.stream(
                request.method, request.target, headers=list(request.headers), content=request.body
            ) as answer:
                yield Head(answer.status_code, passed_on(answer.headers.raw), self.name)
                async for piece in coalesced(answer.aiter_raw()):
                    yield piece
        except httpx2.HTTPError as error:
            yield Lost(self.name, f"{type(error).__name__} from its server")

    async def try_version(self, trial: Trial) -> Trouble | Lost | None:
        """What the engine has against a version, None if it loads; `Lost` if that cannot be said."""
        try:
            with ExitStack() as held:
                if self._copy is not None:
                    await asyncio.to_thread(held.enter_context, self._copy.holding(trial.tried))
                trouble = await ask_for_trial(self._folder / TRIAL_SOCKET, trial)
            if trouble is not None:
                await self.check_health()  # an engine that has ended can load nothing
        except (OSError, httpx2.HTTPError, RuntimeError, RayError, VllmLoraError) as error:
            return Lost(self.name, str(error) or type(error).__name__)
        return trouble

    def _why_not(self) -> str:
        if self._gone:
            return self._gone
        silent = self._fence.silent_s(time.monotonic())
        return f"it has not reached its controller for {silent:.0f} s" if silent else ""

    async def check_health(self) -> None:
        """Called by Ray every now and then. Raises RuntimeError when Ray should start another replica."""
        if self._gone:
            raise RuntimeError(self._gone)
        answer = await self._client.get("/ready", timeout=30.0)
        if answer.status_code != 200:
            raise RuntimeError(f"the server is not ready: {answer.text[:200]}")

    def _revision(self) -> int:
        return int(self._revision_file.read_text())

    async def _report(self, revision: int) -> None:
        began = time.monotonic()  # the controller counts from when it hears of it, which is later
        await self._controller.report.remote(self.name, revision)
        self._reported_at = began
        self._fence.reported(began)

    async def _keep_looking(self) -> None:
        while True:
            at = time.monotonic()
            if self._fence.should_ask(at) and not await asyncio.to_thread(_has_controller, self._app):
                self._fence.nobody_is_there(at)
            await asyncio.sleep(REPORT_EVERY_S)

    async def _keep_reporting(self) -> None:
        reported = -1
        while True:
            try:
                revision = self._revision()
                if revision != reported or time.monotonic() - self._reported_at >= REPORT_EVERY_S:
                    await asyncio.wait_for(self._report(revision), 5.0)
                    reported = revision
            except Exception as error:  # the controller is starting anew, say
                logger.warning("Replica %s cannot report: %s", self.name, error)
                await asyncio.sleep(REPORT_EVERY_S)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _watch_child(self) -> None:
        """A replica without its server ends: Ray then starts another at once."""
        while not _has_ended(self._child.pid):
            await asyncio.sleep(_LOOK_EVERY_S)
        self._gone = "its server has ended"
        logger.error("Replica %s: %s. Its last lines:\n%s", self.name, self._gone, self._child.last_lines())
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._controller.leave.remote(self.name), 2.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)
        await asyncio.sleep(_LAST_WORDS_S)
        os._exit(1)

    async def where(self) -> dict[str, Any]:
        """For tests and for people: the processes of this replica."""
        return {
            "replica": self.name,
            "pid": os.getpid(),
            "server_pid": self._child.pid,
            "url": self._child.url,
        }

    async def __del__(self) -> None:
        """Called by Ray once the last request has ended."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if (copy := getattr(self, "_copy", None)) is not None:
            copy.stop()
        if hasattr(self, "_client"):
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._controller.leave.remote(self.name), 2.0)
            await asyncio.to_thread(self._child.stop)
        if hasattr(self, "_folder"):
            shutil.rmtree(self._folder, ignore_errors=True)


def _has_controller(app: str) -> bool:
    """Whether a controller runs that may answer changes; True as well where Ray does not say."""
    try:
        states = serve.status().applications[app].deployments[CONTROLLER].replica_states
        return bool(states.get("RUNNING"))
    except Exception:
        logger.exception("Ray does not say whether there is a controller")
        return True


def _has_ended(pid: int) -> bool:
    """Whether a child of this process has ended, without taking note of it for others."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
