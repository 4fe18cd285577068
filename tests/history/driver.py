"""Makes a history: a real server, clients that ask, operators that change names, and kills in between."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from serve.process import ServerProcess
from tests.history.base import make_base
from tests.history.clients import BASE, LONGEST, PROMPTS, ROUTES, Client, Request
from tests.history.markers import Markers
from tests.history.operators import Operator
from tests.history.recorder import Recorder, now
from tests.history.world import ADAPTERS, Name, World

SLOTS, CACHED = 4, 12
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
_KILLED_AFTER_S = (0.02, 0.0, 0.1)
_FIRST_INTAKE_S = 120.0
_SETTLE_S = 10.0  # for what clients left to leave the engine


@dataclass(frozen=True)
class Plan:
    """How much is done. `pause_s` is the mean between two requests of a client."""

    requests: int
    adapters: int
    clients: int = 16
    operators: int = 4
    kills: int = 1
    pause_s: float = 0.1
    operator_pause_s: float = 0.1
    seed: int = 0


class Driver:
    """Runs a plan in `folder`; `history` is the file that it writes."""

    def __init__(self, plan: Plan, folder: Path, tell: Callable[[str], None] = print) -> None:
        self.history = folder / "history.jsonl"
        self._plan, self._tell, self._folder = plan, tell, folder
        self._watched, self._starts, self._began = folder / "adapters", 0, time.monotonic()
        self._watched.mkdir(parents=True)
        self._base = make_base(folder / "model")
        markers = Markers(self._base, folder / "versions")
        self._recorder = Recorder(self.history)
        names = self._names()
        self._world = World(self._recorder, names)
        self._operators = [
            Operator(self._world, markers, names[number :: plan.operators], random.Random(plan.seed + number))
            for number in range(plan.operators)
        ]
        self._left = plan.requests

    def _names(self) -> list[Name]:
        """A fifth belong to commands; names are as people choose them."""
        names = []
        for number in range(self._plan.adapters):
            if number % 5 == 4:
                names.append(Name(f"org/a-{number:02}", None))
            else:
                name = f"小李-{number:02}" if number % 5 == 3 else f"a-{number:02}"
                names.append(Name(name, self._watched / name))
        return names

    async def run(self) -> None:
        """All of it.

        Raises:
            AssertionError: the markers are too weak on this machine to tell anything.
        """
        for operator in self._operators:
            for name in operator.names:
                if name.folder is not None:
                    await operator.begin(name)
        self._start()
        try:
            await self._prepare()
            await self._storm()
            await self._end()
        finally:
            self._server.stop()
            await self._world.close()
            self._recorder.close()

    def _start(self) -> None:
        self._starts += 1
        arguments = [str(self._base), "--adapters", str(self._watched)]
        arguments += ["--state-dir", str(self._folder / "state"), "--served-model-name", BASE]
        arguments += ["--dtype", "float32", "--max-model-len", "512", "--turn-seconds", "0.2"]
        arguments += ["--max-loras", str(SLOTS), "--max-cpu-loras", str(CACHED)]
        log = self._folder / f"server-{self._starts}.log"
        self._server = ServerProcess(arguments, log, _ENVIRONMENT)
        began = time.monotonic()
        self._server.__enter__()
        self._say(f"server ready after {time.monotonic() - began:.0f} s")
        self._world.connect(self._server.url)

    async def _prepare(self) -> None:
        """Every name is there and says its own words, and what the base says is known."""
        self._world.up.set()
        deadline = now() + _FIRST_INTAKE_S
        folders = [name for name in self._world.names if name.folder is not None]
        while any([(await self._world.state_of(name.name))["live"] is None for name in folders]):
            assert now() < deadline, "the folder was not taken"
            await asyncio.sleep(0.2)
        await self._world.note_states()
        for operator in self._operators:
            for name in operator.names:
                if name.live is None:
                    await operator.put(name)
        asker = Client(self._world, random.Random(0))
        for route in ROUTES:
            for prompt in range(len(PROMPTS)):
                asked = Request(BASE, None, route=route, prompt=prompt, max_tokens=LONGEST)
                said = (await asker.ask(asked))["tokens"]
                assert len(said) == LONGEST, "the base does not answer"
                self._recorder.write("base", route=route, prompt=prompt, tokens=said)
        for name in self._world.names:
            assert name.live is not None
            asked = Request(f"{name.name}@{name.live}", name.name, name.live, prompt=4)
            said = (await asker.ask(replace(asked, max_tokens=8)))["tokens"]
            assert len(said) == 8 and set(said) <= set(name.markers[name.live].words), "a marker is too weak"
        self._say(f"{len(self._world.names)} names are there and say their own words")

    async def _storm(self) -> None:
        """Requests and changes, with kills in between."""
        stop = asyncio.Event()
        operators = [
            asyncio.create_task(operator.run(stop, self._plan.operator_pause_s))
            for operator in self._operators
        ]
        clients = [asyncio.create_task(self._ask(number)) for number in range(self._plan.clients)]
        for number in range(1, self._plan.kills + 1):
            while self._left > self._plan.requests * (1 - number / (self._plan.kills + 1)):
                await asyncio.sleep(0.05)
            await self._kill(_KILLED_AFTER_S[number % len(_KILLED_AFTER_S)])
        await asyncio.gather(*clients)
        self._say("all requests have ended")
        stop.set()
        await asyncio.gather(*operators)

    async def _ask(self, number: int) -> None:
        chance = random.Random(self._plan.seed + 1000 + number)
        client = Client(self._world, chance)
        while self._left > 0:
            await self._world.up.wait()
            self._left -= 1
            await client.ask(client.draw())
            await asyncio.sleep(chance.random() * 2 * self._plan.pause_s)

    async def _kill(self, after_s: float) -> None:
        """So long after a change began: one that is cut off, or just acknowledged, is the hardest."""
        self._world.asked.clear()
        await self._world.asked.wait()
        await asyncio.sleep(after_s)
        self._say(f"kill -9, {self._plan.requests - self._left} requests were sent")
        start = now()
        self._world.up.clear()
        os.killpg(self._server.pid, signal.SIGKILL)
        await asyncio.to_thread(self._server.stop)
        await asyncio.to_thread(self._start)
        end = now()
        await self._world.note_states()
        self._recorder.write("outage", start=start, end=end)
        self._world.up.set()

    async def _end(self) -> None:
        """Nothing runs any more, and everything is as it was acknowledged."""
        deadline = now() + _SETTLE_S
        while any(busy := await self._busy()) and now() < deadline:
            await asyncio.sleep(0.2)
        self._recorder.write("rest", running=busy[0], waiting=busy[1])
        await self._world.note_states()

    async def _busy(self) -> tuple[int, int]:
        """Requests that run and wait, for the adapters' list and for vLLM, whichever says more."""
        rows = (await self._world.admin.get(ADAPTERS)).json()["data"]
        text = (await self._world.admin.get("/metrics")).text
        counts = []
        for what in ("running", "waiting"):
            gauge = re.findall(rf"^vllm:num_requests_{what}\{{.*\}} (\S+)$", text, re.MULTILINE)
            counts.append(int(max(sum(row[what] for row in rows), *map(float, gauge))))
        return counts[0], counts[1]

    def _say(self, text: str) -> None:
        self._tell(f"{time.monotonic() - self._began:6.1f} s  {text}")
