"""The controller: the only writer of the catalog, and the one who knows how far every replica is.

It judges what is published and watches the folders of adapters, as a server on one machine does. A change is
answered when every replica goes by it. There is one of it; when it ends, Ray starts another, which finds
everything on the disk, and waits a lease before its first answer, until all replicas have reported.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from serve import launch
from serve.adapter_view import adapter_view, finding_data, removed_view
from serve.admin_routes import api_error
from serve.config import FrontSettings, ServeConfig, front_settings, read_config, read_own_flags
from serve.fleet import agreed_base_model
from serve.openai_errors import ApiError
from serve.plan import infer_adapters, infer_server
from serve.scaleout.copies import file_names, read_piece
from serve.scaleout.membership import Membership
from serve.scaleout.settings import FleetSettings, without
from serve.scaleout.trials import Trials
from serve.scaleout.uploads import Uploads
from serve.taking import taking
from vllm_lora_ext.archive import Unpacker
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import AdapterRefused, StoreFailed, VersionDamaged, VersionMissing, VllmLoraError
from vllm_lora_ext.free_memory import free_memory
from vllm_lora_ext.inbox import Condition, version_of
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.intake import Admitted, admit
from vllm_lora_ext.names import ascii_shown, judge_name
from vllm_lora_ext.peft_format import MAX_WEIGHTS_BYTES
from vllm_lora_ext.records import Version
from vllm_lora_ext.sources import AdapterSource, find_sources
from vllm_lora_ext.spec import EngineLimits
from vllm_lora_ext.state_file import STATE_FILE

logger = logging.getLogger("ray.serve")

_UPLOADS = "uploads"  # in the state folder
_ACKNOWLEDGED_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.02
_TIDY_EVERY_S, _COLLECT_EVERY_S = 1.0, 30.0
_NEWS_S = 5.0  # as long somebody waits for a change before being told that there is none
_MAX_ARCHIVE_BYTES = MAX_WEIGHTS_BYTES + (64 << 20)
_PIECE_BYTES = 1 << 20
# What the controller says to the children itself, or what is no business of theirs.
_OWN_FLAGS = ("--adapters", "--lora-modules", "--state-dir", "--base-model", "--host", "--port")
_SAME_EVERYWHERE = ("max_lora_rank", "max_loras")
_NEVER = (-1, 0.0)
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Plan:
    """What replicas and gateways need to know; `front` is who may ask for what."""

    child_flags: tuple[str, ...]
    state_dir: Path
    base_names: tuple[str, ...]
    front: FrontSettings


@dataclass(frozen=True)
class Status:
    """Who takes part, and which names are on their way, with the reason.

    A controller that `is_settled` knows of all; before, those who take part may have to report yet.
    """

    members: tuple[str, ...]
    is_settled: bool
    revision: int
    pending: Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """An answer of HTTP; `body` becomes JSON, or plain text if it is one."""

    status: int
    body: Any
    headers: Mapping[str, str]


class Controller:
    """See the module. Ray Serve makes exactly one."""

    def __init__(self, settings: FleetSettings) -> None:
        launch.prepare_environment()
        args, _ = launch.parse_with_vllm(settings.serve)
        config = read_config(args, launch.UNSTATED)
        self._held = ExitStack()
        self._catalog = self._held.enter_context(launch.open_catalog(config))
        try:
            self._begin(args, config, settings)
        except BaseException:
            self._held.close()
            raise

    def _begin(self, args: Any, config: ServeConfig, settings: FleetSettings) -> None:
        sources = [*find_sources(config.adapters), *config.modules]
        remembered = self._catalog.base().get("name")
        base = read_base_model(config.base_model or agreed_base_model(sources, remembered))
        self._membership = Membership(time.monotonic())
        self._trials = Trials(self._membership.members)
        condition = Condition(_trial_mark(args, settings), self._trials.check, waits=False)
        inbox, items, rows = launch.admit_fleet(sources, base, config, self._catalog, condition)
        served = [row for row in rows if not row.is_refused]
        ranks, sizes = [row.rank for row in served], [row.size_bytes for row in served]
        inferred = infer_server(base.public_name, config.stated)
        inferred += infer_adapters(ranks, sizes, free_memory(), config.stated)
        values = dict(config.stated) | {item.name: item.value for item in inferred}
        rank = int(values["max_lora_rank"])
        self._rules = Rules(inbox.rules.base, inbox.rules.base_names, EngineLimits(rank), config.allow)
        self._folders = self._held.enter_context(taking(inbox, items, config))
        args.host = values["host"]
        own = read_own_flags(settings.serve)
        args.api_key = list(own.api_keys) or None
        flags = [*without(settings.serve, _OWN_FLAGS), "--base-model", base.name, "--host", "127.0.0.1"]
        for name in _SAME_EVERYWHERE:
            if name not in config.stated:
                flags += [f"--{name.replace('_', '-')}", str(values[name])]
        state_dir, front = self._catalog.state_dir, front_settings(args)
        self._plan = Plan(tuple(flags), state_dir, tuple(inbox.rules.base_names), front)
        self._uploads = Uploads(state_dir / _UPLOADS, _MAX_ARCHIVE_BYTES)
        self._changes = asyncio.Lock()
        self._collected = _NEVER
        threading.Thread(target=self._keep_tidy, name="controller-tidy", daemon=True).start()

    def _keep_tidy(self) -> None:
        while True:
            try:
                self._tidy()
            except Exception:  # a disk that fails, say
                logger.exception("The store cannot be tidied")
            time.sleep(_TIDY_EVERY_S)

    async def plan(self) -> Plan:
        """What replicas and gateways start with."""
        return self._plan

    async def report(self, replica: str, revision: int) -> None:
        """A replica takes part, and its server goes by this revision."""
        self._trials.begin()
        self._membership.report(replica, revision, time.monotonic())

    async def leave(self, replica: str) -> None:
        """A replica answers no more."""
        self._membership.leave(replica)

    async def status(self) -> Status:
        """What gateways look at about once a second."""
        now = time.monotonic()
        members, is_settled = tuple(self._membership.members(now)), self._membership.is_settled(now)
        return Status(members, is_settled, self._catalog.revision, dict(self._folders.pending()))

    # What is copied, for those that do not share the state folder.

    async def state_file(self, known: int) -> bytes | None:
        """As `copies.Source`."""
        deadline = time.monotonic() + _NEWS_S
        while self._catalog.revision == known and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_EVERY_S)
        file = self._catalog.state_dir / STATE_FILE
        return None if self._catalog.revision == known else await asyncio.to_thread(file.read_bytes)

    async def files(self, digest: str) -> list[str] | None:
        """As `copies.Source`; None if it is not there."""
        return await _unless_gone(lambda: file_names(self._catalog.store, digest))

    async def piece(self, digest: str, name: str, offset: int) -> bytes | None:
        """As `copies.Source`; None if it is not there."""
        return await _unless_gone(lambda: read_piece(self._catalog.store, digest, name, offset))

    def _tidy(self) -> None:
        """Remove from the store what no name needs, once no replica goes by a name that did."""
        revision, at = self._catalog.revision, time.monotonic()
        if revision == self._collected[0] or at - self._collected[1] < _COLLECT_EVERY_S:
            return
        if self._membership.is_settled(at) and not self._membership.behind(revision, at):
            self._collected = revision, at
            self._catalog.collect()

    # Changes.

    async def upload(self, number: str, piece: bytes) -> Answer | None:
        """Take the next piece of an archive; an answer only if that failed."""

        async def work() -> Any:
            await asyncio.to_thread(self._uploads.add, number, piece)

        answer = await answered(work)
        return None if answer.status == 200 else answer

    async def forget(self, number: str) -> None:
        """Nobody needs this archive any more."""
        self._uploads.forget(number)

    async def publish(self, name: str, number: str, replaces: bool, chat: Mapping[str, Any]) -> Answer:
        """Take an adapter's archive, which was uploaded, as the live version of `name`."""

        async def work() -> Any:
            admitted, version = await asyncio.to_thread(self._admit, name, self._uploads.file(number), chat)
            try:
                await self._trials.require(name, version)
                return await self._done_everywhere(lambda: self._publish(name, version, replaces))
            finally:
                admitted.version.release()
                self._collected = _NEVER  # if it got no name

        return await answered(work)

    def _admit(self, name: str, archive: Path, chat: Mapping[str, Any]) -> tuple[Admitted, Version]:
        if findings := judge_name(name, self._rules.base_names):
            raise AdapterRefused(ascii_shown(name), findings)
        rules, stated = replace(self._rules, follow_links=False), ChatOverride.from_json(dict(chat))
        self._catalog.incoming.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._catalog.incoming) as folder:
            try:
                _unpack(archive, Path(folder))
            except OSError as error:
                raise StoreFailed(name, error) from error
            admitted = admit(Path(folder), self._catalog.store, rules, name, chat=stated)
            version = version_of(admitted, self._catalog, rules, AdapterSource(name, folder))
            return admitted, replace(version, source="upload")

    def _publish(self, name: str, version: Version, replaces: bool) -> dict[str, Any]:
        self._catalog.publish(name, version, replaces)
        return self._view(name)

    async def rollback(self, name: str, to: str | None) -> Answer:
        """Make an earlier version live again."""

        def work() -> Any:
            self._catalog.rollback(name, to)
            return self._view(name)

        return await self._change(work)

    async def split(self, name: str, percent: Mapping[str, int]) -> Answer:
        """Split a name's requests over its versions."""

        def work() -> Any:
            self._catalog.set_traffic(name, percent)
            return self._view(name)

        return await self._change(work)

    async def remove(self, name: str) -> Answer:
        """Take a name out of service; what runs finishes."""

        def work() -> Any:
            self._catalog.remove([name])
            return removed_view(name)

        return await self._change(work)

    def _view(self, name: str) -> dict[str, Any]:
        return adapter_view(self._catalog.entry(name), ())

    async def _change(self, work: Callable[[], Any]) -> Answer:
        """Do it, and answer once every replica goes by it."""
        return await answered(lambda: self._done_everywhere(work))

    async def _done_everywhere(self, work: Callable[[], Any]) -> Any:
        async with self._changes:
            body = await asyncio.to_thread(work)
            revision = self._catalog.revision
        deadline = time.monotonic() + _ACKNOWLEDGED_WITHIN_S
        while (now := time.monotonic()) < deadline:
            if self._membership.is_settled(now) and not self._membership.behind(revision, now):
                return body
            await asyncio.sleep(_LOOK_EVERY_S)
        behind = ", ".join(self._membership.behind(revision, deadline)) or "the fleet has just started"
        message = f"The change is on the disk, but not all replicas go by it yet ({behind}). It will hold."
        raise ApiError(504, message, "not_everywhere", "server_error")

    def __del__(self) -> None:
        """Called by Ray at the end: another controller may write then."""
        if hasattr(self, "_held"):
            self._held.close()


def _trial_mark(args: Any, settings: FleetSettings) -> str:
    """Under which conditions an engine's refusal is the last word."""
    told = repr((launch.proof_mark(args), without(settings.serve, _OWN_FLAGS)))
    return f"trial {hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _unpack(archive: Path, folder: Path) -> None:
    unpacker = Unpacker(folder, _MAX_ARCHIVE_BYTES)
    with archive.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            unpacker.feed(piece)
    unpacker.close()


async def answered(work: Callable[[], Awaitable[Any]]) -> Answer:
    """What `work` gives, or its error as OpenAI's error object."""
    try:
        return Answer(200, await work(), {})
    except ApiError as error:
        return Answer(error.status, error.body(), dict(error.headers))
    except VllmLoraError as error:
        failure = api_error(error)
        body: dict[str, Any] = failure.body()
        if isinstance(error, AdapterRefused):
            body["error"]["findings"] = [finding_data(finding) for finding in error.findings]
        return Answer(failure.status, body, dict(failure.headers))


async def _unless_gone(work: Callable[[], _Result]) -> _Result | None:
    """What `work` reads from the store; None where it is not: not every error of ours can be pickled."""
    try:
        return await asyncio.to_thread(work)
    except (VersionMissing, VersionDamaged):
        return None
