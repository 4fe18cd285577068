"""Many threads, one catalog: changes come one after the other, and nobody sees half of one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import StateLocked
from vllm_lora_ext.records import FolderRecord
from vllm_lora_ext.state_file import LOCK_FILE, owner, read_state


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "state") as catalog:
        yield catalog


def note(catalog: Catalog, *keys: str) -> None:
    """A change that is as cheap as there is one."""
    catalog.note_folders({key: FolderRecord(None, (), key) for key in keys})


def test_no_change_of_any_thread_is_lost(catalog: Catalog) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: note(catalog, str(number)), range(100)))
    assert set(catalog.folders()) == set(map(str, range(100))) and catalog.revision == 100
    assert read_state(catalog.state_dir).state.folders == catalog.folders()


def test_other_threads_see_what_was_saved_last(catalog: Catalog) -> None:
    with ThreadPoolExecutor(1) as pool:

        def elsewhere() -> tuple[int, set[str]]:
            return pool.submit(lambda: (catalog.revision, set(catalog.folders()))).result()

        with catalog.together():
            note(catalog, "a")
            note(catalog, "b")
            assert set(catalog.folders()) == {"a", "b"}, "who puts it together sees what there is so far"
            assert elsewhere() == (0, set())
        assert elsewhere() == (1, {"a", "b"})


def test_a_reader_never_sees_a_revision_without_its_changes(catalog: Catalog) -> None:
    done = threading.Event()

    def read() -> int:
        looks = 0
        while not done.is_set():
            revision = catalog.revision
            found = len(catalog.folders())
            assert found >= 2 * revision and found % 2 == 0
            looks += 1
        return looks

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for number in range(10):
            with catalog.together():
                note(catalog, f"{number}-first")
                note(catalog, f"{number}-second")
        done.set()
        assert all(reader.result() for reader in readers)


def test_who_writes_waits_for_what_is_put_together(catalog: Catalog) -> None:
    with ThreadPoolExecutor(1) as pool:
        with catalog.together():
            note(catalog, "a")
            other = pool.submit(note, catalog, "b")
            with pytest.raises(TimeoutError):
                other.result(0.1)
        other.result()
    assert set(catalog.folders()) == {"a", "b"} and catalog.revision == 2


def test_nothing_is_collected_while_it_gets_a_name(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    collecting, go_on = threading.Event(), threading.Event()

    def collect(needed: set[str]) -> list[str]:
        collecting.set()
        assert go_on.wait(10)
        return []

    monkeypatch.setattr(catalog.store, "collect", collect)
    with ThreadPoolExecutor(2) as pool:
        collected = pool.submit(catalog.collect)
        assert collecting.wait(10)
        other = pool.submit(note, catalog, "a")
        with pytest.raises(TimeoutError):
            other.result(0.1)
        go_on.set()
        other.result(), collected.result()


def test_a_block_within_a_block_is_part_of_it_and_may_fail_alone(catalog: Catalog) -> None:
    with catalog.together():
        note(catalog, "a")
        with pytest.raises(KeyError), catalog.together():
            note(catalog, "b")
            raise KeyError
        with catalog.together():
            note(catalog, "c")
        assert catalog.revision == 0
    assert set(catalog.folders()) == {"a", "c"} and catalog.revision == 1


def test_a_block_that_fails_leaves_no_lock_behind(catalog: Catalog) -> None:
    with pytest.raises(KeyError), catalog.together():
        note(catalog, "a")
        raise KeyError
    with ThreadPoolExecutor(1) as pool:
        pool.submit(note, catalog, "b").result(10)
    assert set(catalog.folders()) == {"b"}


def test_another_process_is_told_who_has_the_lock_and_where_to_ask(catalog: Catalog) -> None:
    assert owner(catalog.state_dir) == f"process {os.getpid()}"
    catalog.note_url("http://127.0.0.1:1")
    catalog.note_url("http://127.0.0.1:8000")
    code = (
        "import sys; from pathlib import Path; from vllm_lora_ext.catalog import Catalog;"
        "Catalog(Path(sys.argv[1]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(catalog.state_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"is in use by process {os.getpid()} at http://127.0.0.1:8000." in told.stderr
    with pytest.raises(StateLocked, match="opened for reading"):
        Catalog(catalog.state_dir, readonly=True).note_url("http://127.0.0.1:1")


@pytest.mark.parametrize("told", [b"", b"\xff\n", b"x" * 5000, b"\x1b[31m\n\n"])
def test_a_lock_file_that_says_nothing_sensible_is_not_repeated(catalog: Catalog, told: bytes) -> None:
    (catalog.state_dir / LOCK_FILE).write_bytes(told)
    with pytest.raises(StateLocked, match="is in use by another process"):
        Catalog(catalog.state_dir)


def test_a_new_owner_does_not_give_the_last_ones_url(catalog: Catalog) -> None:
    catalog.note_url("http://127.0.0.1:8000")
    catalog.close()
    with Catalog(catalog.state_dir):
        assert owner(catalog.state_dir) == f"process {os.getpid()}"
