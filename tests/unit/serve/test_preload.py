"""What comes into memory while nobody asks for anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from serve.preload import preload
from tests.unit.serve.front_side import Shop, nothing_is_held
from tests.unit.serve.test_manager import request


def test_spare_memory_is_filled_in_quiet_times_and_what_cannot_be_loaded_stops_nothing(
    tmp_path: Path, make_adapter: Callable[..., Path]
) -> None:
    async def work() -> None:
        shop = Shop(tmp_path / "state", make_adapter)
        versions = {}
        for name, alpha in (("a", 16), ("b", 17), ("c", 18)):
            shop.publish(name, alpha)
            version = shop.live.resolve(name)
            assert version is not None
            versions[name] = version
        shop.engine.failing[versions["a"].model] = "no"
        ends = asyncio.Event()
        busy = asyncio.create_task(request(shop.manager, versions["c"], ends))
        ahead = asyncio.create_task(preload(shop.live, shop.manager))
        await asyncio.sleep(1.2)
        assert set(shop.engine.memory.values()) == {versions["c"].model}, "somebody is being served"
        ends.set()
        await busy
        async with asyncio.timeout(30):
            while len(shop.engine.memory) < 2:
                await asyncio.sleep(0.05)
        assert set(shop.engine.memory.values()) == {versions["b"].model, versions["c"].model}
        assert shop.live.names() == ["b", "c"], "the first is noted as one that cannot be loaded"
        ahead.cancel()
        with suppress(asyncio.CancelledError):
            await ahead  # what it was about to load is let go
        assert nothing_is_held(shop.manager)

    asyncio.run(work())
