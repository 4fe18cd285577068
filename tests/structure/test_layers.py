"""The shape of the house: who may import whom, how large a room may grow, and no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("vllm_lora_ext", "serve", "train")
FORBIDDEN = {  # package -> what it may not import anywhere
    "vllm_lora_ext": {"serve", "train"},
    "serve": set(),  # train only lazily, below
    "train": {"serve", "vllm"},
}
# Files whose work is vLLM, torch or PEFT; all others import them inside functions, or not at all.
_INSIDE_VLLM = tuple(  # imported by vLLM's own processes only, after vLLM
    f"vllm_lora_ext/engine/{name}.py" for name in ("calls", "cpu_lora", "failures", "loading", "residency")
)
_TENSORS = tuple(
    f"vllm_lora_ext/{name}.py"
    for name in ("grouped", *(f"engine/{name}" for name in ("isolation", "slots", "weights")))
)
_TRAINING = tuple(
    f"train/{name}.py" for name in ("answer_loss", "attention", "batches", "fused", "probes", "trainer")
)
_JOINT = tuple(
    f"train/joint/{name}.py"
    for name in ("company", "grouped_lora", "layout", "members", "model", "own_state", "passes")
)
_CONVERSION = tuple(
    f"train/conversion/{name}.py"
    for name in ("beginnings", "check", "factors", "known", "plan", "through_peft", "written")
)
HEAVY_AT_THE_TOP = {
    "vllm": _INSIDE_VLLM,
    "torch": (*_INSIDE_VLLM, *_TENSORS, *_TRAINING, *_JOINT, *_CONVERSION),
    "peft": (),
    "transformers": ("train/trainer.py", "train/progress.py", "train/stopping.py", "train/joint/company.py"),
}
VLLM_ANYWHERE = ("vllm_lora_ext/engine/", "serve/launch.py", "serve/endpoint.py", "serve/vllm_engine.py")
FILES = sorted(path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)  # may be a module too


def top_level(path: Path) -> set[str]:
    """Modules imported when the file is; what stands under TYPE_CHECKING is not."""
    return {name for node in tree(path).body for name in imported(node)}


def anywhere(path: Path) -> set[str]:
    return {name for node in ast.walk(tree(path)) for name in imported(node)}


def packages(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert not packages(anywhere(path)) & FORBIDDEN[path.parts[0]]
    if path.parts[0] == "serve":
        assert "train" not in packages(top_level(path))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_heavy_packages_are_imported_where_their_work_is(path: Path) -> None:
    for package, allowed in HEAVY_AT_THE_TOP.items():
        if package in packages(top_level(path)):
            assert str(path) in allowed
    if "vllm" in packages(anywhere(path)):
        assert str(path).startswith(VLLM_ANYWHERE)


def test_no_circle() -> None:
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    arrows = {name: top_level(path) & set(modules) for name, path in modules.items()}

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way, name])
        for target in arrows[name]:
            walk(target, (*way, name))

    for name in modules:
        walk(name, ())


def test_files_and_functions_stay_small() -> None:
    lengths = sorted(len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in FILES)
    assert lengths[-1] <= 400
    assert lengths[len(lengths) // 2] <= 150
    functions = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert functions[-1] <= 80
    assert functions[int(len(functions) * 0.9)] <= 30


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_and_public_name_says_what_it_is(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module), "the file has no docstring"
    for node in module.body:
        public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if public and node.name not in ("main", "usage"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
