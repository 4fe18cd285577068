"""A fleet behind keys that follows its load: a second replica comes, and goes without cutting a stream."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.scaleout.conftest import ADMIN, KEY, Fleet, make_adapter, running_fleet, wait_for
from tests.scaleout.test_fleet import NAMES, ask, streamed
from vllm_lora_ext.archive import pack


@pytest.fixture(scope="module")
def scaling(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One replica that may become two. One key comes as a flag, one from the environment."""
    flags = ("--replicas", "1", "--max-replicas", "2", "--ongoing-per-replica", "2", "--scale-in-after", "75")
    environment, folder = {"VLLM_LORA_ADMIN_KEY": ADMIN}, tmp_path_factory.mktemp("scaling")
    with running_fleet(tiny_base, folder, *flags, "--api-key", KEY, environment=environment) as fleet:
        wait_for(fleet, 1)
        yield fleet


def test_keys_guard_a_fleet_and_the_servers_in_it(scaling: Fleet, tiny_base: Path, tmp_path: Path) -> None:
    archive = b"".join(pack(make_adapter(tmp_path / "sent", tiny_base, 600)))
    asked = {"model": "a00", "prompt": "hello", "max_tokens": 1}
    (child,) = scaling.children()
    for url in (scaling.url, child.url):
        for key in ("", "wrong"):
            with scaling.client(key) as client:
                client.base_url = url
                for answer in (
                    client.post("/v1/completions", json=asked),
                    client.get("/v1/models"),
                    client.get("/metrics"),
                    client.get("/v1/adapters"),
                    client.put("/v1/adapters/sent", content=archive),
                    client.delete("/v1/adapters/a00"),
                ):
                    assert answer.status_code == 401
                    assert answer.json()["error"]["code"] == "invalid_api_key"
                assert client.get("/health").status_code == 200
    with scaling.client(KEY) as client:
        assert client.post("/v1/completions", json=asked).status_code == 200
        for answer in (
            client.get("/v1/adapters"),
            client.put("/v1/adapters/sent", content=archive),
            client.post("/v1/adapters/a00/rollback"),
            client.delete("/v1/adapters/a00"),
        ):
            assert answer.status_code == 403
            assert answer.json()["error"]["code"] == "admin_key_required"
        assert client.get("/v1/models/a00").status_code == 200
    with scaling.client(ADMIN) as client:
        assert client.put("/v1/adapters/sent", content=archive).status_code == 200
        assert client.post("/v1/completions", json={**asked, "model": "sent"}).status_code == 200
        assert client.delete("/v1/adapters/sent").status_code == 200


def test_a_fleet_grows_with_its_load_and_shrinks_without_cutting_a_stream(scaling: Fleet) -> None:
    fleet, outcomes, much, some = scaling, list[str](), threading.Event(), threading.Event()
    with ThreadPoolExecutor(5) as pool:

        def work(name: str, until: threading.Event) -> None:
            with fleet.client() as client:
                while not until.is_set():
                    outcomes.append(streamed(client, name, 100))
                    time.sleep(0.3)

        began = time.monotonic()
        working = [pool.submit(work, name, much) for name in NAMES[:5]]
        try:
            while len(fleet.children()) < 2:
                assert time.monotonic() < began + 120, "nothing comes"
                time.sleep(0.2)
            grew_after = time.monotonic() - began
            much.set()  # the new replica's start needs the processors
            wait_for(fleet, 2)
            with fleet.client() as client:
                place = {name: ask(client, name).headers["X-Replica"] for name in NAMES}
            assert len(set(place.values())) == 2
            names = [next(n for n in NAMES if place[n] == replica) for replica in set(place.values())]
            working += [pool.submit(work, name, some) for name in names]
            while len(fleet.children()) > 1:
                assert time.monotonic() < began + 300, "nothing leaves"
                time.sleep(0.2)
        finally:
            much.set()
            some.set()
        for one in working:
            one.result()
    print(f"a second replica was started after {grew_after:.0f} s of load; streams:", Counter(outcomes))
    assert set(outcomes) == {"whole"}
