"""Names, versions, rollback, traffic; who may write; and what happens to a damaged state file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BASE_CONFIG, ROOT
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import (
    AdapterExists,
    AdapterUnknown,
    BadSetting,
    StateLocked,
    StateUnreadable,
    StoreFailed,
    VersionDamaged,
    VersionMissing,
)
from vllm_lora_ext.files import lock_file
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import judge_published, publish
from vllm_lora_ext.records import Entry
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.store import AdapterStore

MakeAdapter = Callable[..., Path]
RULES = Rules(BaseModel("base", BASE_CONFIG))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "state", keep_versions=3)


@pytest.fixture
def put(make_adapter: MakeAdapter, catalog: Catalog) -> Callable[..., Entry]:
    """Publish an adapter whose content follows from its alpha."""
    made: dict[float, Path] = {}

    def publish_it(name: str, alpha: float, replace: bool = True) -> Entry:
        if alpha not in made:
            made[alpha] = make_adapter(f"alpha-{alpha}", lora_alpha=alpha)
        return publish(AdapterSource(name, str(made[alpha])), catalog, RULES, replace)[0]

    return publish_it


def reopened(catalog: Catalog) -> Catalog:
    catalog.close()
    return Catalog(catalog.state_dir)


def test_what_was_published_is_there_after_a_restart(catalog: Catalog, put: Callable[..., Entry]) -> None:
    entry = put("小李", 16)
    put("org/name", 32)
    again = reopened(catalog)
    assert again.names() == ["org/name", "小李"]
    assert again.entry("小李") == entry
    assert again.store.verify(entry.live).files.keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_same_content_is_the_same_version(catalog: Catalog, put: Callable[..., Entry]) -> None:
    assert put("a", 16).live == put("b", 16).live
    assert len(catalog.store.digests()) == 1
    assert len(put("a", 16).history) == 1


def test_another_content_needs_to_be_meant(catalog: Catalog, put: Callable[..., Entry]) -> None:
    first = put("a", 16)
    with pytest.raises(AdapterExists, match="--replace"):
        put("a", 32, replace=False)
    assert catalog.entry("a") == first
    assert len(catalog.store.digests()) == 1, "what was not taken is collected"
    assert put("a", 32).live != first.live


def test_a_name_that_looks_like_another_is_refused(put: Callable[..., Entry]) -> None:
    put("xiaoli", 16)
    for name in ("Xiaoli", "ｘiaoli"):
        with pytest.raises(AdapterExists, match="looks like xiaoli"):
            put(name, 16)


def test_rollback_and_back_again(catalog: Catalog, put: Callable[..., Entry]) -> None:
    first, second = put("a", 16).live, put("a", 32).live
    assert catalog.rollback("a").digest == first
    with pytest.raises(AdapterUnknown, match="no earlier version"):
        catalog.rollback("a")
    assert catalog.rollback("a", second[:8]).digest == second
    assert catalog.rollback("a").digest == first
    assert reopened(catalog).resolve("a").digest == first
    assert [event.what for event in catalog.entry("a").history] == ["publish"] * 2 + ["rollback"] * 3


def test_rollback_says_what_there_is(catalog: Catalog, put: Callable[..., Entry]) -> None:
    put("a", 16)
    with pytest.raises(AdapterUnknown, match="no earlier version"):
        catalog.rollback("a")
    with pytest.raises(AdapterUnknown, match="no version of a"):
        catalog.rollback("a", "0000")
    with pytest.raises(AdapterUnknown, match="too short"):
        catalog.rollback("a", "0")
    with pytest.raises(AdapterUnknown, match="There is: a"):
        catalog.rollback("b")


def test_old_versions_go_and_the_live_one_stays(catalog: Catalog, put: Callable[..., Entry]) -> None:
    first = put("a", 1).live
    for alpha in (2, 3):
        put("a", alpha)
    catalog.rollback("a", first)
    for alpha in (4, 5, 6, 7):
        put("a", alpha)
    assert [version.rank for version in catalog.entry("a").versions] == [8] * 3
    assert catalog.store.digests() == {version.digest for version in catalog.entry("a").versions}


def test_traffic_is_split_over_versions(catalog: Catalog, put: Callable[..., Entry]) -> None:
    first, second = put("a", 16).live, put("a", 32).live
    assert catalog.set_traffic("a", {first[:12]: 90, second: 10}).traffic == {first: 90, second: 10}
    assert reopened(catalog).entry("a").traffic == {first: 90, second: 10}
    with pytest.raises(StateLocked, match="opened for reading"):
        Catalog(catalog.state_dir, readonly=True).set_traffic("a", {})


@pytest.mark.parametrize("percent", [{0: 90, 1: 11}, {0: -10, 1: 110}, {0: 50.0, 1: 50}])
def test_traffic_makes_a_hundred(
    catalog: Catalog, put: Callable[..., Entry], percent: dict[int, float]
) -> None:
    digests = [put("a", 16).live, put("a", 32).live]
    with pytest.raises(BadSetting, match="100"):
        catalog.set_traffic("a", {digests[index]: share for index, share in percent.items()})  # type: ignore[misc]


def test_removing_frees_the_store(catalog: Catalog, put: Callable[..., Entry]) -> None:
    put("a", 16), put("b", 32)
    catalog.remove(["a"])
    assert len(catalog.collect()) == 1
    assert reopened(catalog).names() == ["b"]
    with pytest.raises(AdapterUnknown):
        catalog.remove(["b", "a"])
    assert catalog.names() == ["b"], "all names or none"


def test_a_leased_version_is_not_collected(catalog: Catalog, put: Callable[..., Entry]) -> None:
    digest = put("a", 16).live
    other = Catalog(catalog.state_dir, readonly=True)
    with other.store.lease(digest) as version:
        catalog.remove(["a"])
        assert catalog.collect() == []
        assert version.folder.is_dir()
    assert catalog.collect() == [digest]


def test_a_lease_that_comes_while_a_version_is_collected_is_refused(
    catalog: Catalog, put: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not granted for something that is gone a moment later."""
    digest, store = put("a", 16).live, catalog.store
    catalog.remove(["a"])
    granted = []
    upstream = AdapterStore._discard

    def discard(self: AdapterStore, which: str) -> None:
        file = (store.root / which / "version.json").open("rb")
        granted.append(lock_file(file.fileno(), shared=True))
        upstream(self, which)

    monkeypatch.setattr(AdapterStore, "_discard", discard)
    assert catalog.collect() == [digest]
    assert granted == [False]
    with pytest.raises(VersionMissing), store.lease(digest):
        pass


def test_what_was_fetched_by_a_process_that_died_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "state" / "incoming" / "x"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    Catalog(tmp_path / "state").close()
    assert not left.exists()


def test_a_change_that_fails_in_the_middle_is_none(catalog: Catalog, put: Callable[..., Entry]) -> None:
    put("a", 16)
    with pytest.raises(AdapterUnknown), catalog.together():
        put("b", 32)
        catalog.remove(["nobody"])
    assert catalog.names() == ["a"] and reopened(catalog).names() == ["a"]


def test_a_second_writer_is_refused_and_readers_are_not(catalog: Catalog, put: Callable[..., Entry]) -> None:
    with pytest.raises(StateLocked, match=f"process {os.getpid()}"):
        Catalog(catalog.state_dir)
    reader = Catalog(catalog.state_dir, readonly=True)
    assert reader.names() == [] and not reader.refresh()
    put("a", 16)
    assert reader.refresh() and reader.names() == ["a"] and reader.revision == catalog.revision
    assert not reader.refresh()
    catalog.close()
    with Catalog(catalog.state_dir) as again:
        assert again.names() == ["a"]


def test_the_lock_ends_with_the_process_and_a_fork_does_not_keep_it(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from vllm_lora_ext.catalog import Catalog;"
        "catalog = Catalog(Path(sys.argv[1]));"
        "child = os.fork();"
        "(print(child, flush=True), os._exit(0)) if child else (os.close(1), time.sleep(60))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        Catalog(tmp_path).close()
    finally:
        os.kill(int(done.stdout), 9)


def test_several_changes_become_one(catalog: Catalog, put: Callable[..., Entry]) -> None:
    reader = Catalog(catalog.state_dir, readonly=True)
    with catalog.together():
        put("a", 16), put("b", 16)
        assert not reader.refresh()
    assert reader.refresh() and reader.names() == ["a", "b"] and catalog.revision == 1


def test_a_full_disk_leaves_the_state_as_it_was(
    catalog: Catalog, put: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    put("a", 16)

    def no_space(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_lora_ext.state_file.write_new", no_space)
    with pytest.raises(StoreFailed, match="the disk is full"):
        catalog.remove(["a"])
    assert catalog.names() == ["a"] and reopened(catalog).names() == ["a"]
    assert {path.name for path in catalog.state_dir.iterdir()} == {"catalog.json", "lock", "store"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "later", "empty", "list"])
def test_a_damaged_state_file_is_refused_and_kept(
    catalog: Catalog, put: Callable[..., Entry], damage: str
) -> None:
    put("a", 16)
    catalog.close()
    path = catalog.state_dir / "catalog.json"
    data = path.read_bytes()
    body = json.loads(data)
    spoiled = {
        "cut": data[: len(data) // 2],
        "flipped": data.replace(b'"rank": 8', b'"rank": 9'),
        "later": json.dumps(body | {"format": 2}).encode(),
        "empty": b"",
        "list": b"[]",
    }[damage]
    path.write_bytes(spoiled)
    with pytest.raises(StateUnreadable, match=r"damaged|format 2"):
        Catalog(catalog.state_dir)
    assert path.read_bytes() == spoiled
    path.write_bytes(data)
    Catalog(catalog.state_dir).close()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "version.json"])
@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_damaged_version_is_noticed_and_published_again(
    catalog: Catalog, put: Callable[..., Entry], file: str, damage: str
) -> None:
    entry = put("a", 16)
    path = catalog.store.root / entry.live / file
    data = bytearray(path.read_bytes())
    path.parent.chmod(0o755)
    path.unlink()
    if damage != "gone":
        data[-2] ^= 1
        path.write_bytes(data[:-50] if damage == "cut" else data)
    with pytest.raises(VersionDamaged):
        catalog.store.verify(entry.live)
    if damage == "gone":
        (finding,) = judge_published("a", entry.live_version, catalog, RULES)
        assert finding.code == "version_damaged"
    put("a", 16)
    catalog.store.verify(entry.live)


def test_proofs_belong_to_a_version_and_go_with_it(catalog: Catalog, put: Callable[..., Entry]) -> None:
    digest = put("a", 16).live
    catalog.record_proof(digest, "parity", {"largest": 0.0})
    with reopened(catalog) as writer:
        assert writer.proofs(digest) == {"parity": {"largest": 0.0}}
        writer.remove(["a"])
        assert writer.proofs(digest) == {}
