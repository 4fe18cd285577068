"""Every bad adapter of the catalogue is answered with its code, at once, and leaves nothing behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serve.cli import main
from tests.bad_adapters import BAD_ADAPTERS, BadAdapter
from tests.conftest import BASE_CONFIG
from tests.work import Work
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.intake import admit
from vllm_lora_ext.store import AdapterStore

MakeAdapter = Callable[..., Path]
RULES = Rules(BaseModel("base", BASE_CONFIG))
UPLOAD = Rules(BaseModel("base", BASE_CONFIG), follow_links=False)

MOST_CALLS = (
    2_000_000  # some tenths of a second; what grows with the square of these files takes 100 times as many
)

pytestmark = pytest.mark.timeout(20)  # a pipe or a device that is waited for, one call that never ends


def refusal(path: Path, store: AdapterStore, rules: Rules) -> AdapterRefused | None:
    try:
        admit(path, store, rules)
    except AdapterRefused as error:
        return error
    return None


def is_empty(store: AdapterStore) -> bool:
    return not store.root.exists() or not list(store.root.iterdir())


@pytest.mark.parametrize("case", BAD_ADAPTERS, ids=str)
def test_the_store_takes_none_of_it(case: BadAdapter, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder, store = make_adapter(), AdapterStore(tmp_path / "store")
    case.spoil(folder)
    with Work() as work:
        error = refusal(folder, store, UPLOAD if case.uploads_only else RULES)
    assert work.calls < MOST_CALLS, "work that an attacker chooses has a bound"
    if case.code is None:
        assert error is None
        return
    assert error is not None and is_empty(store)
    found = {finding.code: finding for finding in error.findings}
    assert case.code in found
    finding = found[case.code]
    assert finding.item and finding.rule and finding.fix
    assert str(tmp_path) not in str(error).replace(str(folder), ""), "a path outside the adapter"
    assert "Traceback" not in str(error) and str(error).isprintable()


@pytest.mark.parametrize("case", BAD_ADAPTERS, ids=str)
def test_the_command_says_the_same(
    case: BadAdapter, make_adapter: MakeAdapter, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter()
    case.spoil(folder)
    code = main(["validate", str(folder), "--base-model", str(base_folder), "--json"])
    out = capsys.readouterr()
    if not folder.exists():
        assert code == 2 and "no such folder" in out.err
        return
    (report,) = json.loads(out.out)
    if case.code is None or case.uploads_only:
        assert code == 0, report
    else:
        assert code == 2
        assert case.code in {finding["code"] for finding in report["findings"]}


@pytest.mark.parametrize("case", [case for case in BAD_ADAPTERS if case.code], ids=str)
def test_what_is_about_security_cannot_be_allowed(
    case: BadAdapter, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder, store = make_adapter(), AdapterStore(tmp_path / "store")
    case.spoil(folder)
    rules = UPLOAD if case.uploads_only else RULES
    error = refusal(
        folder, store, Rules(rules.base, allow=frozenset([str(case.code)]), follow_links=rules.follow_links)
    )
    if case.security:
        assert error is not None and is_empty(store)
    elif error is not None:  # it broke other rules as well, or holds nothing that could be served
        assert case.row in ("A9", "A10", "A12", "A15", "W3", "W4") or case.code not in {
            finding.code for finding in error.findings if finding.severity == "refused"
        }


def test_an_adapter_that_changes_nothing_is_admitted_with_a_warning(
    make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    folder = make_adapter()
    next(case for case in BAD_ADAPTERS if case.row == "A28").spoil(folder)
    admitted = admit(folder, AdapterStore(tmp_path / "store"), RULES)
    assert [(f.code, f.severity) for f in admitted.inspection.findings] == [("adapter_no_effect", "warning")]


def test_links_are_followed_in_the_operators_own_folder(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    """Hub caches, git-sync and Kubernetes lay adapters out as links."""
    real = make_adapter("real")
    (tmp_path / "..data").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        target = tmp_path / "..data" / name
        (real / name).rename(target)
        (real / name).symlink_to(target)
    (tmp_path / "linked").symlink_to(real)
    store = AdapterStore(tmp_path / "store")
    version = admit(tmp_path / "linked", store, RULES).version
    assert not any(path.is_symlink() for path in version.folder.iterdir())
    assert refusal(tmp_path / "linked", store, UPLOAD) is not None


@contextmanager
def another_user(*readable: Path) -> Iterator[None]:
    """Root may read everything, so the test is somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    for path in readable:
        path.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "."])
def test_a_file_that_may_not_be_read_is_named(name: str, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = make_adapter()
    (folder / name).chmod(0)
    parents = [path for path in folder.parents if path.is_relative_to(tmp_path.parent.parent)]
    with another_user(*parents):
        error = refusal(folder, AdapterStore(tmp_path / "store"), RULES)
    (folder / name).chmod(0o755)
    assert error is not None
    assert {finding.code for finding in error.findings} == {"permission_denied"}


def test_a_file_that_is_written_to_meanwhile_is_not_taken(
    make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_lora_ext import files

    folder, store = make_adapter(), AdapterStore(tmp_path / "store")
    weights, upstream = folder / "adapter_model.safetensors", files.read_chunk
    written = False

    def read_and_write(file: int, target: memoryview) -> int:
        nonlocal written
        if len(target) > 20_000 and not written:  # the values
            written = True
            with weights.open("r+b") as writer:
                writer.seek(-8, os.SEEK_END)
                writer.write(b"\1" * 8)
        return upstream(file, target)

    monkeypatch.setattr(files, "read_chunk", read_and_write)
    error = refusal(folder, store, RULES)
    assert error is not None and written
    assert {finding.code for finding in error.findings} == {"changed_while_reading"}
    assert is_empty(store)


def test_every_code_of_the_catalogue_is_known() -> None:
    later = {"signature_invalid", "quota_exceeded"}  # with signatures and tenants
    from vllm_lora_ext.admission import NOT_ALLOWABLE

    assert later <= NOT_ALLOWABLE
