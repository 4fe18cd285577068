"""What the tests of the front side share: an engine that only notes, versions, a clock, and requests."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry

from serve.gate import Limits
from serve.live import LiveAdapters
from serve.manager import Manager
from serve.metrics import Metrics
from serve.proving import Prover
from serve.served import ServedVersion
from tests.conftest import BASE_CONFIG
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.contract import ChatSettings
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.records import Entry, Version
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.store import StoredVersion

RULES = Rules(BaseModel("base", BASE_CONFIG), ("base", "base-too"))
LIMITS = Limits(slots=2, cached=4, running=8, queue_per_adapter=16, queue_total=32)
_Result = TypeVar("_Result")


class FakeEngine:
    """An `AdapterEngine` whose loads take no time, unless `held` has the model: then until it is set.

    `failing` are the models that it cannot load, and why. It says no to what no engine would bear.
    """

    def __init__(self) -> None:
        self.announced: list[str] = []
        self.memory: dict[int, str] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.failing: dict[str, str] = {}
        self.held: dict[str, asyncio.Event] = {}
        self.placing: list[str] = []
        self.placed: list[str] = []
        self.unplaceable: set[str] = set()
        self.slots_free = asyncio.Event()
        self.slots_free.set()
        self._loading: set[str] = set()

    def announce(self, version: ServedVersion) -> None:
        assert version.model not in self.announced
        self.announced.append(version.model)

    def withdraw(self, version: ServedVersion) -> None:
        self.announced.remove(version.model)

    async def load(self, version: ServedVersion) -> int:
        model = version.model
        assert model not in {*self.memory.values(), *self._loading}, "it is loaded twice"
        self.loads.append(model)
        handle = len(self.loads)
        self._loading.add(model)
        try:
            await (self.held[model].wait() if model in self.held else asyncio.sleep(0))
        finally:
            self._loading.discard(model)
        if model in self.failing:
            raise RuntimeError(self.failing[model])
        self.memory[handle] = model
        return handle

    async def place(self, handle: int) -> None:
        self.placing.append(self.memory[handle])
        await self.slots_free.wait()
        if self.memory[handle] in self.unplaceable:
            raise RuntimeError("no slot")
        self.placed.append(self.memory[handle])

    async def unload(self, handle: int) -> None:
        self.unloads.append(self.memory.pop(handle))


class CountedStore:
    """Stands for the store where only its leases count."""

    def __init__(self) -> None:
        self.leases = 0

    @contextmanager
    def lease(self, digest: str) -> Iterator[None]:
        self.leases += 1
        try:
            yield
        finally:
            self.leases -= 1


def a_version(name: str, sign: str = "a", chat: ChatSettings | None = None) -> ServedVersion:
    """A version of which nothing is on the disk."""
    digest = sign * 64
    version = Version(digest, 8, 1, "base", "admitted", "", "2030-01-01")
    return ServedVersion(name, version, StoredVersion(digest, Path(), {}, chat or ChatSettings()), None)


def a_manager(
    engine: FakeEngine,
    store: Any,
    limits: Limits = LIMITS,
    failed: Callable[[ServedVersion, str], None] = lambda version, reason: None,
    **more: Any,
) -> Manager:
    """A manager whose metrics nobody else sees."""
    return Manager(engine, store, limits, Metrics(registry=CollectorRegistry()), failed, **more)


def nothing_is_held(manager: Manager) -> bool:
    """No request holds a lease, nobody waits, nobody is in the engine; what is in memory is kept."""
    gate, leases = manager.gate, manager._leases
    if any(lease.count for lease in leases.values()) or not set(leases) <= set(gate.in_memory()):
        return False
    return not manager._starts and (gate.running, gate.waiting) == (0, 0)


class _SimulatedTime(selectors.DefaultSelector):
    """Time passes only where everybody waits for it, and then at once."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for ever"
        self.now += timeout
        return super().select(0)


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop in which waiting takes no time. Not for threads."""

    def __init__(self) -> None:
        self._simulated = _SimulatedTime()
        super().__init__(self._simulated)

    def time(self) -> float:
        return self._simulated.now


def run_simulated(work: Coroutine[Any, Any, _Result]) -> _Result:
    """As `asyncio.run`, in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(work)


async def spin(rounds: int = 20) -> None:
    """Let everybody else go on."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class Shop:
    """A catalog with its live adapters, manager and engine, as `AdapterEndpoint` puts them together."""

    def __init__(
        self,
        state_dir: Path,
        make_adapter: Callable[..., Path],
        limits: Limits = LIMITS,
        stated_template: str | None = None,
    ) -> None:
        self.catalog = Catalog(state_dir)
        self.make_adapter = make_adapter
        self.pending: dict[str, str] = {}
        self._made = 0
        self.now = 1000.0
        self.prover: Prover | None = None
        self.engine = FakeEngine()
        self.live = LiveAdapters(
            self.catalog,
            RULES,
            stated_template,
            lambda: self.pending,
            lambda model: self.manager.retire(model),
            lambda: self.now,
            lambda name, version: self.prover.missing(name, version) if self.prover else None,
        )
        self.manager = a_manager(self.engine, self.catalog.store, limits, self.live.note_failure)

    def folder(self, alpha: float, **files: str) -> Path:
        """An adapter's folder; its content follows from `alpha` and the further files."""
        self._made += 1
        folder = self.make_adapter(f"made-{self._made}", lora_alpha=alpha)
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return folder

    def publish(self, name: str, alpha: float = 16, **files: str) -> Entry:
        """Make what follows from `alpha` the live version of `name`, as the watched folder does."""
        source = AdapterSource(name, str(self.folder(alpha, **files)))
        return publish(source, self.catalog, RULES, replace=True)[0]


@dataclass
class Answer:
    """What a client got."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, which has exactly OpenAI's keys and shows no path of this machine."""
        error: dict[str, Any] = self.json["error"]
        assert {"message", "type", "param", "code"} <= set(error) <= {*_ERROR_KEYS}
        assert isinstance(error["code"], str)
        return error


_ERROR_KEYS = ("message", "type", "param", "code", "findings")
App = Callable[[MutableMapping[str, Any], Any, Any], Coroutine[Any, Any, None]]


async def ask(
    app: App,
    method: str,
    path: str,
    body: object = b"",
    headers: Mapping[str, str] | Sequence[tuple[bytes, bytes]] = (),
    pieces: AsyncIterator[bytes] | None = None,
) -> Answer:
    """One request to an ASGI app. A body that is no bytes is sent as JSON; `pieces` come as they come."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    if isinstance(headers, Mapping):
        headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost"), *headers],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 8000),
    }
    answer, sent = Answer(), False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if pieces is not None and not sent:
            try:
                return {"type": "http.request", "body": await anext(pieces), "more_body": True}
            except StopAsyncIteration:
                sent = True
                return {"type": "http.request", "body": b"", "more_body": False}
            except ConnectionError:
                return {"type": "http.disconnect"}
        if not sent:
            sent = True
            return {"type": "http.request", "body": raw, "more_body": False}
        await asyncio.Event().wait()  # a client that stays
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {key.decode(): value.decode() for key, value in message["headers"]}
        else:
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    return answer
