"""What vLLM must have: found by importing and by reading, and what follows where it is missing."""

from __future__ import annotations

import importlib
import re
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_file
from vllm_lora_ext.engine import compat
from vllm_lora_ext.engine.symbols import FEATURES, Feature, symbols_of
from vllm_lora_ext.errors import MissingPackage

check_symbols = load_file(ROOT / "deploy" / "check_symbols.py", "check_symbols")

FILES = {
    "__init__.py": "",
    "engine.py": """
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from . import base
from .base import Base as Parent, moved
from .stars import *

if TYPE_CHECKING:
    from .base import only_for_checkers

try:
    import no_such_package_anywhere as fast
except ImportError:
    fallback = True
else:
    never = True

T = TypeVar("T")
first, second = 1, 2

@overload
def read(path: int): ...
@overload
def read(path: str): ...
def read(path, mode="r", *, strict=False): ...

class Manager(Parent, Generic[T]):
    limit: int
    kind = Parent

    def __init__(self, size):
        self.size = size

    def load(self, request, *, inplace=False): ...

    @classmethod
    def make(cls, config): ...

class Child(base.Base): ...
""",
    "base.py": """
import dataclasses

class Base:
    def inherited(self, value): ...

def moved(a, b): ...

@dataclasses.dataclass
class Record:
    name: str
    path: str = ""
""",
    "stars.py": "from .base import Record\n_hidden = 1\n",
    "lazy.py": """
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .base import Record

def __getattr__(name):
    if name == "Record":
        from .base import Record
        return Record
    raise AttributeError(name)
""",
}
THERE = (
    "base:Base.inherited(value)",
    "engine:Child.inherited",
    "engine:Manager(size)",
    "engine:Manager.inherited(value)",
    "engine:Manager.kind.inherited(value)",
    "engine:Manager.limit",
    "engine:Manager.load(*, inplace)",
    "engine:Manager.load(request)",
    "engine:Manager.make(config)",
    "engine:Manager.size",
    "engine:Record(name, path)",
    "engine:Record.name",
    "engine:base.Record(*, path)",
    "engine:fallback",
    "engine:moved(a, b)",
    "engine:read(path, mode, *, strict)",
    "engine:second",
    "lazy:Record(name)",
)
MISSING = (
    "base:Base.load",
    "engine:Manager.gone",
    "engine:Manager.size.deeper",
    "engine:_hidden",
    "engine:gone.deeper",
    "engine:only_for_checkers",
    "nowhere:thing",
    "lazy:Other",
)
CHANGED = (
    "engine:Manager(length)",
    "engine:Manager.load(adapter)",
    "engine:Manager.load(request, *, force)",
    "engine:Manager.make(cls)",
    "engine:Record(path)",
    "engine:moved(b)",
    "engine:read(mode)",
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a small package that can be imported, and read under `tmp_path`; new for each test."""
    name = "fake_" + re.sub(r"\W", "_", tmp_path.name)
    folder = tmp_path / name
    folder.mkdir()
    for file, text in FILES.items():
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def feature_of(package: str, *symbols: str, safety: bool = False) -> Feature:
    return Feature("f", tuple(f"{package}.{symbol}" for symbol in symbols), "it is slower", safety)


def test_what_is_there_is_found_by_importing_and_by_reading(package: str, tmp_path: Path) -> None:
    feature = feature_of(package, *THERE)
    assert compat.missing_symbols(feature) == ()
    assert check_symbols.missing_in_source(feature, tmp_path) == ()


def test_what_is_missing_is_named_alike_by_importing_and_by_reading(package: str, tmp_path: Path) -> None:
    feature = feature_of(package, *MISSING)
    named = [f"{package}.{symbol}" for symbol in MISSING]
    named[MISSING.index("nowhere:thing")] = f"{package}.nowhere"
    assert list(compat.missing_symbols(feature)) == named
    assert list(check_symbols.missing_in_source(feature, tmp_path)) == named


def test_other_parameters_are_named_by_importing_and_by_reading(package: str, tmp_path: Path) -> None:
    feature = feature_of(package, *CHANGED)
    imported, read = compat.missing_symbols(feature), check_symbols.missing_in_source(feature, tmp_path)
    assert len(imported) == len(read) == len(CHANGED)
    for fault in (*imported, *read):
        assert "(must take " in fault
    assert f"{package}.engine:moved (must take b; takes a, b)" in imported
    assert f"{package}.engine:moved (must take b; takes a, b)" in read


def test_modules_that_import_each_other_do_not_hang_the_reader(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "one.py").write_text("from .two import *\nfrom .two import thing\n")
    (tmp_path / package / "two.py").write_text("from .one import *\nfrom .one import thing\n")
    feature = feature_of(package, "one:thing")
    assert check_symbols.missing_in_source(feature, tmp_path) == (f"{package}.one:thing",)


def test_a_module_that_breaks_when_imported_says_how(package: str, tmp_path: Path) -> None:
    (tmp_path / package / "broken.py").write_text("raise RuntimeError('no driver')")
    feature = feature_of(package, "broken:thing")
    assert compat.missing_symbols(feature) == (
        f"{package}.broken (cannot be imported: RuntimeError: no driver)",
    )


def test_our_own_replacements_are_not_judged(package: str) -> None:
    feature = feature_of(package, "engine:Manager.load(request)")
    assert compat.missing_symbols(feature) == ()
    manager = importlib.import_module(f"{package}.engine").Manager
    manager.load = lambda *anything: None
    assert compat.missing_symbols(feature) == ()


def test_a_feature_without_its_symbols_is_turned_off_with_one_line(package: str) -> None:
    whole = Feature("whole", (f"{package}.engine:Manager",), "never")
    usable = compat.judge([whole, feature_of(package, "engine:gone", "nowhere:x")])
    assert usable.names == {"whole"}
    (line,) = usable.warnings
    assert line.startswith("f is off, so it is slower: vLLM ")
    assert line.endswith(f" lacks {package}.engine:gone, {package}.nowhere")


def test_a_safety_feature_without_its_symbols_refuses_unless_told_otherwise(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(compat.SKIP_VARIABLE, raising=False)
    unsafe = feature_of(package, "engine:gone", "engine:Manager.gone", safety=True)
    with pytest.raises(MissingPackage) as refusal:
        compat.judge([unsafe])
    for words in ("engine:gone", "engine:Manager.gone", compat.TESTED_VERSION, compat.SKIP_FLAG):
        assert words in str(refusal.value)
    monkeypatch.setenv(compat.SKIP_VARIABLE, "1")
    assert compat.judge([unsafe]).names == frozenset()
    assert len(compat.judge([unsafe]).warnings) == 1
    with pytest.raises(MissingPackage):
        compat.judge([unsafe], skip_safety=False)


def test_only_features_of_the_platform_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "missing_symbols", lambda item: ())
    everywhere = {item.name for item in FEATURES if item.platform == "any"}
    assert compat.usable_features("cuda").names == everywhere
    assert compat.usable_features("cpu").names == everywhere | {"isolation", "compile"}
    assert compat.usable_features("cpu", names={"compile"}).names == {"compile"}


def test_the_list_is_well_formed() -> None:
    assert len({item.name for item in FEATURES}) == len(FEATURES)
    for item in FEATURES:
        assert len(set(item.symbols)) == len(item.symbols)
        for symbol in item.symbols:
            assert compat.read_symbol(symbol).module.startswith("vllm.")
    assert compat.TESTED_VERSION in compat.CHECKED_VERSIONS
    with pytest.raises(ValueError):
        compat.read_symbol("vllm.lora")


def test_a_table_gives_each_member_its_owner() -> None:
    table = "\na.b:C(x)\na.b:C\n    one two(x, *, y)\n    three.four\na.c:\n    f\na.d:g\n"
    assert symbols_of(table) == (
        *("a.b:C(x)", "a.b:C.one", "a.b:C.two(x, *, y)", "a.b:C.three.four"),
        *("a.c:f", "a.d:g"),
    )


def test_the_installed_vllm_has_every_symbol() -> None:
    installed = check_symbols.installed()
    if not installed:
        pytest.skip("no vLLM is installed")
    (root,) = installed.values()
    for item in FEATURES:
        assert check_symbols.missing_in_source(item, root) == ()


def test_of_a_wheel_only_python_files_are_unpacked_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def downloaded(version: str, folder: Path) -> Path:
        wheel = folder / f"vllm-{version}-any.whl"
        with zipfile.ZipFile(wheel, "x") as archive:
            archive.writestr("vllm/__init__.py", "")
            archive.writestr("vllm/_C.so", "large")
        return wheel

    monkeypatch.setattr(check_symbols, "CACHE", tmp_path)
    monkeypatch.setattr(check_symbols, "_downloaded", downloaded)
    for _ in range(2):
        folder = check_symbols.unpacked("9.9")
    assert [path.name for path in (folder / "vllm").iterdir()] == ["__init__.py"]
    assert [path.name for path in tmp_path.iterdir()] == ["vllm-9.9"]


@pytest.mark.parametrize(("safety", "code"), [(True, 1), (False, 0)])
def test_the_table_says_what_is_missing_where(
    package: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    safety: bool,
    code: int,
) -> None:
    monkeypatch.setattr(check_symbols, "FEATURES", (feature_of(package, "engine:gone", safety=safety),))
    monkeypatch.setattr(check_symbols, "installed", lambda: {})
    monkeypatch.setattr(check_symbols, "unpacked", lambda version: tmp_path)
    assert check_symbols.main(["9.8", "9.9"]) == code
    told = capsys.readouterr().out
    assert told.count("1 missing") == 2
    assert f"9.9, f: it is slower\n  {package}.engine:gone\n" in told
