"""What clients and operators share: the server as it can be reached right now, and the names."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from serve.client import make_async_client
from tests.history.markers import Marker
from tests.history.recorder import Recorder, now
from tests.history.timeline import ABSENT, State

REQUEST_TIMEOUT_S = 90.0
ADAPTERS = "/v1/adapters"


@dataclass
class Name:
    """One name: its watched folder, whether that or a command owns it, its versions, and its state.

    `in_folder` is what the folder was given last, None if there is none; `is_cut` if it was truncated.
    """

    name: str
    folder: Path | None
    owner: str | None = None
    in_folder: Marker | None = None
    is_cut: bool = False
    markers: dict[str, Marker] = field(default_factory=dict)
    state: State = field(default_factory=lambda: ABSENT)

    @property
    def live(self) -> str | None:
        """Its live version."""
        live: str | None = self.state["live"]
        return live


class World:
    """`up` is set while the server is to be asked, `asked` whenever a change by HTTP begins."""

    def __init__(self, recorder: Recorder, names: list[Name]) -> None:
        self.recorder, self.names = recorder, names
        self.up = asyncio.Event()
        self.asked = asyncio.Event()
        self.openai: Any = None
        self.admin: httpx2.AsyncClient
        self._all: list[Any] = []

    def connect(self, url: str) -> None:
        """From now on ask the server at `url`."""
        self.openai = make_async_client(url, REQUEST_TIMEOUT_S)
        self.admin = httpx2.AsyncClient(base_url=url, timeout=120.0, trust_env=False)
        self._all += [self.openai.close, self.admin.aclose]  # those of before may still be in use

    async def close(self) -> None:
        """Let the connections go."""
        for close in self._all:
            await close()

    async def state_of(self, name: str) -> State:
        """What the server says of a name. Raises httpx2.HTTPError if it does not answer."""
        answer = await self.admin.get(f"{ADAPTERS}/{quote(name)}")
        if answer.status_code == httpx2.codes.NOT_FOUND:
            return ABSENT
        body = answer.raise_for_status().json()
        if body["version"] is None:  # its folder is refused, incomplete or being looked at
            return ABSENT
        return {
            "live": body["version"],
            "traffic": body["traffic"],
            "versions": [version["version"] for version in body["versions"]],
            "history": [[event["what"], event["version"]] for event in body["history"]],
        }

    async def note_states(self) -> None:
        """Ask for every name, and record it."""
        for name in self.names:
            start = now()
            name.state = await self.state_of(name.name)
            self.recorder.write("state", name=name.name, state=name.state, start=start, end=now())
