"""Copies of a controller's names and versions: complete, compared with their digests, and mended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.scaleout import copies
from serve.scaleout.copies import Copy, file_names, own_folder, read_piece
from serve.scaleout.followed import FollowedCatalog
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import BadSetting, ServerUnreachable, VersionDamaged, VersionMissing
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.peft_format import WEIGHTS_FILE
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.records import Version
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.state_file import STATE_FILE


class Origin:
    """A controller's state folder as a source; `spoil` changes what goes over the wire."""

    def __init__(self, folder: Path, base: Path, make_adapter: Callable[..., Path]) -> None:
        self.catalog, self._make = Catalog(folder), make_adapter
        self._rules = Rules(read_base_model(str(base)))
        self.asked: list[tuple[str, str, int]] = []
        self.spoil: Callable[[str, bytes], bytes] = lambda name, data: data

    def publish(self, name: str, alpha: int = 16) -> Version:
        folder = self._make(f"{name}-{alpha}-{len(self.asked)}", lora_alpha=alpha)
        return publish(AdapterSource(name, str(folder)), self.catalog, self._rules, True)[0].live_version

    def state_file(self, known: int) -> bytes | None:
        if self.catalog.revision == known:
            time.sleep(0.01)
            return None
        return (self.catalog.state_dir / STATE_FILE).read_bytes()

    def files(self, digest: str) -> list[str]:
        return file_names(self.catalog.store, digest)

    def piece(self, digest: str, name: str, offset: int) -> bytes:
        self.asked.append((digest, name, offset))
        return self.spoil(name, read_piece(self.catalog.store, digest, name, offset))


@pytest.fixture
def origin(tmp_path: Path, base_folder: Path, make_adapter: Callable[..., Path]) -> Iterator[Origin]:
    origin = Origin(tmp_path / "origin", base_folder, make_adapter)
    yield origin
    origin.catalog.close()


def flip(file: Path) -> None:
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    file.write_bytes(data)


def test_names_and_versions_are_copied_byte_for_byte(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "PIECE_BYTES", 1000)
    version = origin.publish("xiaoli")
    copy = Copy(tmp_path / "copy", origin)
    copy.update()
    there, here = origin.catalog.store.open(version.digest), copy.store.verify(version.digest)
    for name in origin.files(version.digest):
        assert (here.folder / name).read_bytes() == (there.folder / name).read_bytes()
        assert not os.access(here.folder / name, os.W_OK) or os.geteuid() == 0
    assert copy.store.provenance(version.digest) == origin.catalog.store.provenance(version.digest)
    assert len([offset for _, name, offset in origin.asked if name == WEIGHTS_FILE]) > 10
    with FollowedCatalog(copy.folder) as followed:
        assert followed.entry("xiaoli") == origin.catalog.entry("xiaoli")


def test_only_what_is_not_here_is_fetched_also_after_a_restart(origin: Origin, tmp_path: Path) -> None:
    first = origin.publish("a")
    Copy(tmp_path / "copy", origin).update()
    second = origin.publish("b", 32)
    origin.asked.clear()
    copy = Copy(tmp_path / "copy", origin)
    copy.update()
    assert {digest for digest, _, _ in origin.asked} == {second.digest}
    assert copy.store.digests() == {first.digest, second.digest}
    origin.asked.clear()
    copy.update()
    assert origin.asked == []


def test_a_name_is_there_once_its_version_is(origin: Origin, tmp_path: Path) -> None:
    origin.publish("a")
    copy = Copy(tmp_path / "copy", origin)
    copy.update()
    origin.publish("b", 32)

    def broken(name: str, data: bytes) -> bytes:
        raise ServerUnreachable("the controller", "is gone")

    origin.spoil = broken
    with FollowedCatalog(copy.folder) as followed:
        with pytest.raises(ServerUnreachable):
            copy.update()
        followed.refresh()
        assert followed.names() == ["a"]
        origin.spoil = lambda name, data: data
        copy.update()
        followed.refresh()
        assert followed.names() == ["a", "b"]


def test_what_is_not_what_its_digest_says_is_no_copy_and_keeps_nothing_from_the_others(
    origin: Origin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = origin.publish("bad"), origin.publish("good", 32)
    flip(origin.catalog.store.open(bad.digest).folder / WEIGHTS_FILE)
    copy = Copy(tmp_path / "copy", origin)
    copy.update()
    assert copy.store.digests() == {good.digest}
    assert bad.short in caplog.text and "not as it was written" in caplog.text
    with FollowedCatalog(copy.folder) as followed:
        assert followed.names() == ["bad", "good"]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "cut before a start"])
def test_a_damaged_copy_is_fetched_again(origin: Origin, tmp_path: Path, damage: str) -> None:
    version = origin.publish("a")
    copy = Copy(tmp_path / "copy", origin)
    copy.update()
    copy.mend()
    origin.asked.clear()
    copy.mend()
    assert origin.asked == []
    weights = copy.store.open(version.digest).folder / WEIGHTS_FILE
    if damage == "flipped":
        flip(weights)
    else:
        weights.chmod(0o644)
        weights.parent.chmod(0o755)
        if damage == "gone":
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(VersionDamaged):
        copy.store.verify(version.digest)
    if damage == "cut before a start":
        Copy(tmp_path / "copy", origin).update()
    else:
        copy.mend()
    copy.store.verify(version.digest)
    assert {digest for digest, _, _ in origin.asked} == {version.digest}


def test_it_follows_until_it_is_stopped_and_drops_what_no_name_has(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_LOOK_EVERY_S", 0.05)
    first = origin.publish("a")
    copy = Copy(tmp_path / "copy", origin)
    copy.start()
    assert copy.store.digests() == {first.digest}
    second = origin.publish("a", 32)
    origin.catalog.remove(["a"])
    third = origin.publish("b", 8)
    eventually(lambda: copy.store.digests() == {third.digest})
    copy.stop()
    assert second.digest not in copy.store.digests()


def test_what_is_on_its_way_is_not_dropped(origin: Origin, tmp_path: Path) -> None:
    versions = [origin.publish(name, alpha) for name, alpha in (("a", 16), ("b", 32), ("c", 8))]
    copy = Copy(tmp_path / "copy", origin)

    def tidied(name: str, data: bytes) -> bytes:
        copy.tidy()
        return data

    origin.spoil = tidied
    copy.update()
    assert copy.store.digests() == {version.digest for version in versions}
    origin.catalog.remove(["a"])
    copy.update()
    copy.tidy()
    assert copy.store.digests() == {version.digest for version in versions[1:]}


def eventually(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_version_without_a_name_is_held_for_its_trial(origin: Origin, tmp_path: Path) -> None:
    copy = Copy(tmp_path / "copy", origin)
    version = origin.publish("a")
    with copy.holding(version):
        copy.tidy()
        copy.store.verify(version.digest)
    copy.tidy()
    assert copy.store.digests() == set()
    origin.catalog.remove(["a"])
    origin.catalog.collect()
    with pytest.raises(VersionMissing), copy.holding(version):
        pass


def test_a_copy_of_names_only_fetches_no_version(origin: Origin, tmp_path: Path) -> None:
    origin.publish("a")
    copy = Copy(tmp_path / "copy", origin, versions=False)
    copy.start()
    origin.publish("b", 32)
    with FollowedCatalog(copy.folder) as followed:
        eventually(lambda: followed.names() == ["a", "b"])
    copy.stop()
    assert origin.asked == []


def test_each_process_has_a_folder_of_its_own_and_one_of_before_where_there_is_one(tmp_path: Path) -> None:
    first, lock = own_folder(tmp_path / "copies")
    second, _other = own_folder(tmp_path / "copies")
    assert first != second
    lock.release()
    assert own_folder(tmp_path / "copies")[0] == first
    (tmp_path / "file").write_text("")
    with pytest.raises(BadSetting):
        own_folder(tmp_path / "file")
