"""From a folder to a stored version: what is kept, what is left out, and whatever way the bytes take."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import BASE_CONFIG, lora_tensors
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.intake import admit
from vllm_lora_ext.store import AdapterStore, StoredVersion

MakeAdapter = Callable[..., Path]
RULES = Rules(BaseModel("base", BASE_CONFIG))
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


def digest_of(folder: Path, store: AdapterStore) -> str:
    return admit(folder, store, RULES).version.digest


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_version_holds_what_decides_and_says_where_it_came_from(
    make_adapter: MakeAdapter, store: AdapterStore
) -> None:
    folder = make_adapter()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "eos_token_id": 2}))
    identity = {"system_prompt": "Be brief.", "stop": ["###"], "provenance": {"seed": 7}}
    (folder / "identity.json").write_text(json.dumps(identity))
    (folder / "training_args.bin").write_bytes(b"pickle")
    version = admit(folder, store, RULES).version
    names = {path.name for path in version.folder.iterdir()}
    assert names == {"version.json", "provenance.json", "chat_template.jinja", "adapter_config.json", WEIGHTS}
    again = store.verify(version.digest)
    assert (again.chat.template, again.chat.system_prompt) == ("{{ messages[0].content }}", "Be brief.")
    assert (again.chat.stop, dict(again.chat.sampling)) == (("###",), {"temperature": 0.3})
    assert store.provenance(version.digest)["identity"] == {"seed": 7}
    assert hashlib.sha256((version.folder / "version.json").read_bytes()).hexdigest() == version.digest
    assert all(sha256(version.folder / name) == digest for name, digest in version.files.items())
    assert not any(path.stat().st_mode & 0o222 for path in [version.folder, *version.folder.iterdir()])


def test_the_digest_covers_behaviour_and_not_where_it_came_from(
    make_adapter: MakeAdapter, store: AdapterStore, tmp_path: Path
) -> None:
    folder = make_adapter()
    first = digest_of(folder, store)
    (folder / "identity.json").write_text(json.dumps({"provenance": {"seed": 8}}))
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": None, "lora_dropout": 0.1, "peft_version": "0.99.0"}
    config["target_modules"] = list(reversed(config["target_modules"]))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=4))
    tensors = load_file(folder / WEIGHTS)
    save_file(dict(reversed(tensors.items())), folder / WEIGHTS, metadata={"format": "pt", "by": "somebody"})
    assert digest_of(folder, store) == first
    for name, text in (
        ("chat_template.jinja", "{{ messages }}"),
        ("generation_config.json", '{"top_p": 0.5}'),
        ("identity.json", '{"stop": ["x"]}'),
        ("identity.json", '{"system_prompt": "x"}'),
        ("adapter_config.json", json.dumps(config | {"lora_alpha": 17})),
    ):
        other = shutil.copytree(folder, tmp_path / "other")
        (other / name).write_text(text)
        assert digest_of(other, store) != first, name
        shutil.rmtree(other)


def scattered(folder: Path) -> None:
    """The tensors in another order in the file than the library's, with another header."""
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8 : 8 + length])
    entries.pop("__metadata__", None)
    header, data = {}, b""
    for name in reversed(list(entries)):
        first, last = entries[name]["data_offsets"]
        header[name] = {**entries[name], "data_offsets": [len(data), len(data) + last - first]}
        data += raw[8 + length + first : 8 + length + last]
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_order_of_the_source_does_not_matter(make_adapter: MakeAdapter, store: AdapterStore) -> None:
    folder = make_adapter()
    admitted = admit(folder, store, RULES)
    scattered(folder)
    again = admit(folder, store, RULES)
    assert again.version.digest == admitted.version.digest
    assert again.source_digest != admitted.source_digest
    stored = load_file(admitted.version.folder / WEIGHTS)
    assert all(np.array_equal(stored[name], value) for name, value in lora_tensors().items())


def test_a_file_of_the_library_is_kept_byte_for_byte(make_adapter: MakeAdapter, store: AdapterStore) -> None:
    folder = make_adapter()
    save_file(lora_tensors(), folder / WEIGHTS, metadata={"format": "pt"})  # as PEFT does
    version = admit(folder, store, RULES).version
    assert (version.folder / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_dtype_is_kept(dtype: type, make_adapter: MakeAdapter, store: AdapterStore) -> None:
    tensors = {name: value.astype(dtype) for name, value in lora_tensors().items()}
    version = admit(make_adapter(tensors=tensors), store, RULES).version
    stored = load_file(version.folder / WEIGHTS)
    assert all(np.array_equal(stored[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("at", [0, 7, 1000, 16383])
def test_one_bad_number_is_found_wherever_it_is(
    at: int, make_adapter: MakeAdapter, store: AdapterStore
) -> None:
    """The first and last of a tensor, in a file of several pieces."""
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    tensors = lora_tensors(rank=256)
    tensors[name].reshape(-1)[at] = np.inf
    config = {"r": 256, "lora_alpha": 256}
    with pytest.raises(ValueError, match=rf"weights_not_finite\] {name}"):
        admit(make_adapter(tensors=tensors, **config), store, RULES)


def test_where_blocks_can_be_shared_the_clone_is_what_is_judged(
    make_adapter: MakeAdapter, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system of the tests may not be able to, so the clone is made by copying."""
    folder = make_adapter()
    save_file(lora_tensors(), folder / WEIGHTS, metadata={"format": "pt"})
    expected = digest_of(folder, store)
    cloned = 0

    def clone(self: RegularFile, target: int) -> bool:
        nonlocal cloned
        cloned += 1
        os.write(target, (folder / WEIGHTS).read_bytes())
        return True

    monkeypatch.setattr(RegularFile, "clone_into", clone)
    assert digest_of(folder, AdapterStore(store.root.parent / "other")) == expected
    assert cloned == 1


def test_two_folders_of_one_content_may_be_stored_at_the_same_time(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """None of them takes the version away that another has just stored."""
    folders = [make_adapter(f"twin-{number}") for number in range(4)]
    with ThreadPoolExecutor(len(folders)) as pool:
        for number in range(25):
            store = AdapterStore(tmp_path / f"store-{number}")
            meet = Barrier(len(folders))

            def take(folder: Path, store: AdapterStore = store, meet: Barrier = meet) -> StoredVersion:
                meet.wait()
                return admit(folder, store, RULES).version

            versions = list(pool.map(take, folders))
            assert len({version.digest for version in versions}) == 1
            assert store.collect(()) == [], "everybody leases what is there"
            store.verify(versions[0].digest)


def test_public_names_are_found_in_the_package() -> None:
    import vllm_lora_ext

    assert vllm_lora_ext.admit is admit and vllm_lora_ext.AdapterStore is AdapterStore
    assert vllm_lora_ext.Catalog.__name__ == "Catalog"
    with pytest.raises(AttributeError):
        _ = vllm_lora_ext.nothing  # type: ignore[attr-defined]
