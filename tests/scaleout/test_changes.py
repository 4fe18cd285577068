"""What a fleet makes live: a version is loaded by one replica's engine first, however it came."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2

from tests.scaleout.conftest import Fleet, make_adapter
from vllm_lora_ext.archive import pack


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def publish(url: str, name: str, folder: Path) -> httpx2.Response:
    with httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        return client.put(f"/v1/adapters/{name}?replace=true", content=b"".join(pack(folder)))


def test_a_version_that_the_engine_cannot_load_is_refused_before_it_is_live(
    fleet: Fleet, tiny_base: Path, tmp_path: Path
) -> None:
    """Admission takes it; the engine was told to leave its module alone."""
    bad = make_adapter(tmp_path / "bad", tiny_base, 400, "o_proj")
    good = make_adapter(tmp_path / "good", tiny_base, 401)
    assert publish(fleet.url, "tried", good).status_code == 200
    with fleet.client() as client:
        before = client.get("/v1/models/tried").json()["version"]
        revision = client.get("/v1/adapters/tried").json()["history"]
        for name in ("tried", "unheard"):
            refused = publish(fleet.url, name, bad)
            assert refused.status_code == 500
            assert refused.json()["error"]["code"] == "adapter_failed"
            assert "could not be loaded" in refused.json()["error"]["message"]
            alone = publish(
                fleet.children()[0].url, name, bad
            )  # a whole server, asked as if it were the only one
            assert (alone.status_code, alone.json()) == (refused.status_code, refused.json())
        assert client.get("/v1/models/unheard").status_code == 404
        assert client.get("/v1/models/tried").json()["version"] == before
        assert client.get("/v1/adapters/tried").json()["history"] == revision
        assert client.delete("/v1/adapters/tried").status_code == 200


def test_a_folder_that_the_engine_cannot_load_is_refused_with_the_reason(
    fleet: Fleet, tiny_base: Path, tmp_path: Path
) -> None:
    def shown(name: str) -> dict[str, Any]:
        with fleet.client() as client:
            return dict(client.get(f"/v1/adapters/{name}").json())

    def refusals() -> set[str]:
        with fleet.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return {line.split()[-1] for line in lines if line.startswith("vllm_lora_adapters_refused{")}

    make_adapter(tmp_path / "tested", tiny_base, 402, "o_proj").rename(fleet.adapters / "tested")
    eventually(lambda: shown("tested").get("state") == "refused")
    (finding,) = shown("tested")["findings"]
    assert finding["code"] == "load_failed" and "could not be loaded" in finding["rule"]
    eventually(lambda: refusals() == {"1.0"})
    shutil.rmtree(fleet.adapters / "tested")
    make_adapter(tmp_path / "tested", tiny_base, 403).rename(fleet.adapters / "tested")
    eventually(lambda: shown("tested").get("state") in ("stored", "cached", "slot"))
    shutil.rmtree(fleet.adapters / "tested")
    eventually(lambda: "error" in shown("tested"))
    eventually(lambda: refusals() == {"0.0"})
