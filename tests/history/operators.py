"""Operators: each changes names of its own, one change after the other, by HTTP and in the watched folder.

Every change is recorded with what it is expected to come to, and what the server then says of the name.
"""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2

from tests.history.markers import Marker, Markers
from tests.history.recorder import now
from tests.history.timeline import ABSENT, State, agree
from tests.history.world import ADAPTERS, Name, World
from vllm_lora_ext.archive import pack

_POLL_S = 0.1
_NEVER_S = 60.0  # a change in the folder that is not seen by then will not come
_QUIET_S = 1.5  # after it, a change that is not to come would have come
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Operator:
    """See the module; `chance` decides what it does."""

    def __init__(self, world: World, markers: Markers, names: list[Name], chance: random.Random) -> None:
        self._world, self._markers, self.names, self._chance = world, markers, names, chance

    async def run(self, stop: asyncio.Event, pause_s: float) -> None:
        """Change one name after the other until told to stop; then what was truncated is mended."""
        while not stop.is_set():
            await self._world.up.wait()
            await self.change(self._chance.choice(self.names))
            await asyncio.sleep(self._chance.random() * 2 * pause_s)
        for name in self.names:
            if name.is_cut:
                await self.change(name)

    async def change(self, name: Name) -> None:
        """One change that is possible now."""
        await self._chance.choice(self._possible(name))(name)

    def _possible(self, name: Name) -> list[Callable[[Name], Awaitable[None]]]:
        if name.is_cut:
            return [self.copy, self.copy, self.delete_folder]
        deeds: list[Callable[[Name], Awaitable[None]]] = [self.put, self.put_broken]
        if name.folder is not None and (name.owner == "folder" or name.live is None):
            deeds += [self.copy, self.copy, self.copy_slowly]
        if name.in_folder is not None:
            deeds.append(self.delete_folder)
            if name.owner == "folder":
                deeds += [self.truncate, self.truncate]
        if name.live is not None:
            deeds += [self.remove, self.put_beside]
            if name.folder is not None and name.owner == "command":
                deeds.append(self.copy_in_vain)
        if len(name.state["versions"]) > 1:
            deeds += [self.rollback, self.rollback, self.split, self.split]
        if name.state["traffic"]:
            deeds.append(self.unsplit)
        return deeds

    # By HTTP.

    async def put(self, name: Name) -> None:
        """Publish a version, mostly a new one."""
        marker, is_new = await self._marker(name, name.live), name.live is None
        body = b"".join(pack(marker.folder))
        expected = {"live": marker.version, "traffic": {}}
        query = {} if is_new else {"replace": "true"}
        if await self._ask(name, "put", "PUT", "", expected, 200, content=body, params=query):
            name.owner = "command"

    async def put_beside(self, name: Name) -> None:
        """Publish without `replace` what has other content than what is there."""
        marker = await self._new(name)
        body = b"".join(pack(marker.folder))
        await self._ask(name, "put_beside", "PUT", "", name.state, 409, content=body)

    async def put_broken(self, name: Name) -> None:
        """Publish what is cut short: the archive, or the weights in it."""
        marker = await self._new(name)
        body, wanted = b"".join(pack(marker.folder))[:-3000], 400
        if self._chance.random() < 0.5:
            with (marker.folder / _WEIGHTS).open("r+b") as file:
                file.truncate(9000)
            body, wanted = b"".join(pack(marker.folder)), 422
        query = {"replace": "true"}
        await self._ask(name, "put_broken", "PUT", "", name.state, wanted, content=body, params=query)

    async def remove(self, name: Name) -> None:
        """Take the name out of service; its folder stays and is not taken again."""
        if await self._ask(name, "remove", "DELETE", "", ABSENT, 200):
            name.owner = None

    async def rollback(self, name: Name) -> None:
        """To the version before, or to any."""
        newest_first = name.state["versions"]
        place = newest_first.index(name.live)
        to = self._chance.choice([version for version in newest_first if version != name.live])
        if place + 1 < len(newest_first) and self._chance.random() < 0.5:
            to, body = newest_first[place + 1], {}
        else:
            body = {"to": to}
        await self._ask(name, "rollback", "POST", "/rollback", {"live": to, "traffic": {}}, 200, json=body)

    async def split(self, name: Name) -> None:
        """The traffic over two versions."""
        one, other = self._chance.sample(name.state["versions"], 2)
        percent = self._chance.randint(1, 99)
        traffic = {one: percent, other: 100 - percent}
        expected = {"live": name.live, "traffic": traffic}
        await self._ask(name, "split", "PUT", "/traffic", expected, 200, json={"traffic": traffic})

    async def unsplit(self, name: Name) -> None:
        """All of it to the live one."""
        expected: State = {"live": name.live, "traffic": {}}
        await self._ask(name, "unsplit", "PUT", "/traffic", expected, 200, json={"traffic": {}})

    async def _ask(
        self, name: Name, what: str, method: str, verb: str, expected: State, wanted: int, **sent: Any
    ) -> bool:
        """Whether it was done, for all that is known now."""
        start = now()
        self._world.asked.set()
        try:
            answer = await self._world.admin.request(method, f"{ADAPTERS}/{quote(name.name)}{verb}", **sent)
        except httpx2.HTTPError:  # the server is down, and whether it was done shows when it is back
            self._record(name, what, start, expected, None)
            await self._back()
            return wanted == httpx2.codes.OK and agree(name.state, expected)
        told = {"end": now(), "status": answer.status_code, "wanted": wanted}
        try:
            name.state = await self._world.state_of(name.name)
            self._record(name, what, start, expected, name.state, **told)
        except httpx2.HTTPError:  # what it acknowledged has to hold all the same
            self._record(name, what, start, expected, expected, **told)
            await self._back()
        return answer.status_code == wanted == httpx2.codes.OK

    # In the watched folder.

    async def copy(self, name: Name) -> None:
        """A version into the folder, over what is there: `cp -r`."""
        marker = await self._for_folder(name)
        await self._in_folder(name, "copy", marker, lambda: _copy(marker.folder, name.folder))

    async def copy_slowly(self, name: Name) -> None:
        """The same over a slow line: the weights come in two parts."""
        marker = await self._for_folder(name)
        await self._in_folder(name, "copy_slowly", marker, lambda: _copy(marker.folder, name.folder, 1.0))

    async def delete_folder(self, name: Name) -> None:
        """The folder; what it serves retires, unless a command took the name over."""
        assert name.folder is not None
        folder, is_owner = name.folder, name.owner == "folder"
        name.is_cut = False
        if is_owner:
            await self._in_folder(name, "delete_folder", None, lambda: shutil.rmtree(folder))
        else:
            name.in_folder = None
            await self._in_vain(name, "delete_taken_over", lambda: shutil.rmtree(folder))

    async def truncate(self, name: Name) -> None:
        """A file of the folder, in place; what is served stays."""
        assert name.folder is not None
        path = name.folder / self._chance.choice((_WEIGHTS, _WEIGHTS, _CONFIG))

        def cut() -> None:
            with path.open("r+b") as file:
                file.truncate(path.stat().st_size // 2)

        name.is_cut = True
        await self._in_vain(name, "truncate", cut)

    async def copy_in_vain(self, name: Name) -> None:
        """Into the folder of a name that belongs to a command, which a folder does not take back."""
        marker = await self._new(name)
        await self._in_vain(name, "copy_in_vain", lambda: _copy(marker.folder, name.folder))
        name.in_folder = marker
        await self.delete_folder(name)

    async def _in_folder(self, name: Name, what: str, marker: Marker | None, act: Callable[[], None]) -> None:
        expected = ABSENT if marker is None else {"live": marker.version, "traffic": {}}
        start = now()
        await asyncio.to_thread(act)
        complete = now()
        while True:
            state = await self._state(name)
            if agree(state, expected) or now() - complete > _NEVER_S:
                break
            await asyncio.sleep(_POLL_S)
        name.state, name.in_folder, name.is_cut = state, marker, False
        name.owner = "folder" if marker else None
        self._record(name, what, start, expected, state, complete=complete)

    async def _in_vain(self, name: Name, what: str, act: Callable[[], None]) -> None:
        start, expected = now(), name.state
        await asyncio.to_thread(act)
        await asyncio.sleep(_QUIET_S)
        name.state = await self._state(name)
        self._record(name, what, start, expected, name.state)

    async def _state(self, name: Name) -> State:
        while True:
            try:
                return await self._world.state_of(name.name)
            except httpx2.HTTPError:
                await self._back()

    async def _back(self) -> None:
        """Until the server is back."""
        await asyncio.sleep(0.5)  # it may be down and nobody has said so yet
        await self._world.up.wait()

    # Versions.

    async def _new(self, name: Name) -> Marker:
        marker = await asyncio.to_thread(self._markers.make, name.name)
        name.markers[marker.version] = marker
        self._world.recorder.write(
            "version", version=marker.version, name=name.name, tokens=list(marker.words)
        )
        return marker

    async def _marker(self, name: Name, but: str | None) -> Marker:
        """Mostly a new one; else one that was there before, and is not `but`."""
        old = [name.markers[version] for version in name.state["versions"] if version != but]
        return self._chance.choice(old) if old and self._chance.random() < 0.2 else await self._new(name)

    async def _for_folder(self, name: Name) -> Marker:
        """What the folder does not hold already, which would be no change."""
        marker = await self._marker(name, name.live)
        return marker if marker is not name.in_folder else await self._new(name)

    async def begin(self, name: Name) -> None:
        """The first version, in the folder of a server that is not up yet."""
        assert name.folder is not None
        name.in_folder, name.owner = await self._new(name), "folder"
        _copy(name.in_folder.folder, name.folder)

    def _record(
        self, name: Name, what: str, start: float, expected: State, after: State | None, **more: Any
    ) -> None:
        fields = {"name": name.name, "what": what, "start": start, "end": now(), **more}
        self._world.recorder.write("change", **fields, expected=expected, after=after)


def _copy(source: Path, target: Path | None, pause_s: float = 0.0) -> None:
    assert target is not None
    target.mkdir(exist_ok=True)
    if pause_s:
        import time

        data = (source / _WEIGHTS).read_bytes()
        with (target / _WEIGHTS).open("wb") as file:
            file.write(data[: len(data) // 3])
            file.flush()
            time.sleep(pause_s)
            file.write(data[len(data) // 3 :])
        shutil.copy(source / _CONFIG, target / _CONFIG)
    else:
        shutil.copytree(source, target, dirs_exist_ok=True)
