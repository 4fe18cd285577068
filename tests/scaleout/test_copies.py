"""Replicas that share no folder: each has its own copy of every version, compared with its digest."""

from __future__ import annotations

from pathlib import Path

import httpx2

from tests.scaleout.conftest import Fleet, make_adapter
from tests.scaleout.test_changes import eventually, publish
from tests.scaleout.test_fleet import ask
from vllm_lora_ext.errors import VersionDamaged, VersionMissing
from vllm_lora_ext.peft_format import WEIGHTS_FILE
from vllm_lora_ext.store import AdapterStore


def is_whole(store: AdapterStore, digest: str) -> bool:
    try:
        store.verify(digest)
    except (VersionMissing, VersionDamaged):
        return False
    return True


def test_every_replica_has_its_own_copy_and_a_damaged_one_is_fetched_again(
    fleet: Fleet, tiny_base: Path, tmp_path: Path
) -> None:
    published = publish(fleet.url, "copied", make_adapter(tmp_path / "copied", tiny_base, 500))
    assert published.status_code == 200
    stores = [AdapterStore(folder / "store") for folder in sorted(fleet.copies.iterdir())]
    assert len(stores) == 2, "a folder for each replica"
    (digest,) = {
        one
        for one in stores[0].digests() & stores[1].digests()
        if one.startswith(published.json()["version"])
    }
    assert all(is_whole(store, digest) for store in stores)
    with httpx2.Client(trust_env=False, timeout=60) as client:
        for store in stores:  # before anybody has asked for it, so that it is in nobody's memory
            weights = store.root / digest / WEIGHTS_FILE
            weights.chmod(0o644)
            data = bytearray(weights.read_bytes())
            data[-3] ^= 0x40
            weights.write_bytes(data)
            assert not is_whole(store, digest)
        eventually(lambda: all(is_whole(store, digest) for store in stores))
        for child in fleet.children():
            client.base_url = child.url
            answer = ask(client, "copied")
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == f"copied@{digest[:12]}"
    with fleet.client() as client:
        assert client.delete("/v1/adapters/copied").status_code == 200
    eventually(lambda: not any(digest in store.digests() for store in stores))
