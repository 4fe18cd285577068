"""A catalog that another writes: changes are seen and told, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.scaleout.followed import FollowedCatalog
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.errors import StateLocked
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.publishing import publish
from vllm_lora_ext.sources import AdapterSource


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_published_is_seen_and_told(
    tmp_path: Path, make_adapter: Callable[..., Path], base_folder: Path
) -> None:
    state, told = tmp_path / "state", list[int]()
    with Catalog(state) as catalog, FollowedCatalog(state, told.append) as followed:
        assert told == [catalog.revision]
        source = AdapterSource("xiaoli", str(make_adapter()))
        publish(source, catalog, Rules(read_base_model(str(base_folder))))
        wait_for(lambda: told[-1] == catalog.revision)
        assert followed.names() == ["xiaoli"]
        with followed.store.lease(followed.entry("xiaoli").live) as version:
            catalog.remove(["xiaoli"])
            assert catalog.collect() == []
            assert version.folder.is_dir()
        wait_for(lambda: followed.names() == [])
        assert told == sorted(set(told))
        followed.record_proof("0" * 64, "parity", {})
        assert followed.collect() == []
        assert catalog.collect() != []
        with pytest.raises(StateLocked):
            followed.note_base("base", "fingerprint")


def test_a_file_that_is_damaged_for_a_while_leaves_the_names_as_they_were(
    tmp_path: Path, make_adapter: Callable[..., Path], base_folder: Path
) -> None:
    state = tmp_path / "state"
    with Catalog(state) as catalog, FollowedCatalog(state) as followed:
        publish(
            AdapterSource("xiaoli", str(make_adapter())), catalog, Rules(read_base_model(str(base_folder)))
        )
        wait_for(lambda: followed.names() == ["xiaoli"])
        (state / "catalog.json").write_text("{")
        time.sleep(0.2)
        assert followed.names() == ["xiaoli"]
        catalog.remove(["xiaoli"])
        wait_for(lambda: followed.names() == [])
