"""Whether a vLLM has what we touch (vllm_lora_ext/engine/compat.py), found out without importing it.

    python deploy/check_symbols.py [VERSION ...]

The installed vLLM, where there is one, is always looked at. Of a version that is named the wheel for
CUDA is downloaded, its Python files are unpacked under .cache/wheels, and read. Nothing is installed.
Exit code 1: a version lacks a symbol of a safety feature.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_lora_ext.engine import compat
from vllm_lora_ext.engine.compat import Symbol
from vllm_lora_ext.engine.symbols import FEATURES, Feature
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.exit_codes import run_command

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "wheels"
# vLLM's wheels for CUDA on Linux; by name, since pip would look for those of this machine.
PLATFORMS = tuple(f"manylinux{tag}_x86_64" for tag in ("_2_35", "_2_31", "_2_28", "2014", "1"))

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Found:
    """What a name stands for, and the module in which that is written."""

    module: str
    node: ast.AST


class Sources:
    """Looks names up in a package's Python files as importing them would, as far as that can be read.

    What comes from another package is there, and no more is known of it: a wheel holds only its own.
    """

    def __init__(self, root: Path, package: str) -> None:
        """`root` is the folder that holds the package."""
        self._root, self._package = root, package
        self._modules: dict[str, Found | None] = {}
        self._open: set[tuple[int, str]] = set()  # being looked up, where imports run in a circle

    def module(self, name: str) -> Found | None:
        """The module; None where there is no such file."""
        if name not in self._modules:
            file = self._file(name)
            tree = ast.parse(file.read_text(encoding="utf-8")) if file else None
            self._modules[name] = Found(name, tree) if tree else None
        return self._modules[name]

    def attribute(self, owner: Found, name: str) -> list[Found]:
        """Everything that `owner.name` may stand for; empty where it has no such attribute."""
        key = (id(owner.node), name)
        if key in self._open:
            return []
        self._open.add(key)
        try:
            if isinstance(owner.node, ast.Module):
                return self._in_module(owner, owner.node, name)
            if isinstance(owner.node, ast.ClassDef):
                return self._in_class(owner, owner.node, name)
            return [found for target in self.aliased(owner) for found in self.attribute(target, name)]
        finally:
            self._open.discard(key)

    def aliased(self, alias: Found) -> list[Found]:
        """What an expression such as `other.Name` or `Generic[T]` stands for, in its module."""
        node = alias.node.value if isinstance(alias.node, ast.Subscript) else alias.node
        if isinstance(node, ast.Name):
            module = self.module(alias.module)
            return self.attribute(module, node.id) if module else []
        if isinstance(node, ast.Attribute):
            owners = self.aliased(Found(alias.module, node.value))
            return [found for owner in owners for found in self.attribute(owner, node.attr)]
        if isinstance(node, ast.AnnAssign):  # declared only: an instance of that type
            return self.aliased(Found(alias.module, node.annotation))
        return []

    def parameters(self, function: Found) -> list[str]:
        """Names of a function's parameters, or of those that make an object of a class."""
        node = function.node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            return [item.arg for item in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if isinstance(node, ast.ClassDef):
            makers = self.attribute(function, "__init__")
            return self.parameters(makers[0]) if makers else self._fields(function, node)
        return [name for target in self.aliased(function) for name in self.parameters(target)]

    def _fields(self, owner: Found, node: ast.ClassDef) -> list[str]:
        """Of a dataclass or a model, those of its bases first."""
        bases = [found for base in self._bases(owner, node) for found in self.parameters(base)]
        return bases + [
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]

    def _bases(self, owner: Found, node: ast.ClassDef) -> list[Found]:
        found = [target for base in node.bases for target in self.aliased(Found(owner.module, base))]
        return [target for target in found if isinstance(target.node, ast.ClassDef)]

    def _in_class(self, owner: Found, node: ast.ClassDef, name: str) -> list[Found]:
        if own := [Found(owner.module, binding) for binding in bindings(node.body, name)]:
            return own
        for part in ast.walk(node):  # self.name = ...
            if isinstance(part, ast.Attribute) and part.attr == name and isinstance(part.ctx, ast.Store):
                return [Found(owner.module, part)]
        return [found for base in self._bases(owner, node) for found in self.attribute(base, name)]

    def _in_module(self, owner: Found, node: ast.Module, name: str) -> list[Found]:
        lazy = any(True for _ in bindings(node.body, "__getattr__"))
        found: list[Found] = []
        # A module with __getattr__ tells type checkers the names that it makes on demand.
        for binding in bindings(node.body, name, for_checkers=lazy):
            if isinstance(binding, ast.Import | ast.ImportFrom):
                found += self._imported(owner.module, binding, name)
            else:
                found.append(Found(owner.module, binding))
        return found

    def _imported(self, module: str, node: ast.Import | ast.ImportFrom, name: str) -> list[Found]:
        alias = node.names[0]
        if isinstance(node, ast.Import):
            target = self.module(alias.name if alias.asname else alias.name.split(".")[0])
            return [target or Found(module, node)]
        source = self._absolute(module, node)
        target = self.module(source)
        if target is None:
            return [] if alias.name == "*" else [Found(module, node)]
        if alias.name == "*":
            return [] if name.startswith("_") else self.attribute(target, name)
        submodule = self.module(f"{source}.{alias.name}")
        return self.attribute(target, alias.name) or ([submodule] if submodule else [])

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        file = self._file(module)
        drop = node.level - (file is not None and file.name == "__init__.py")
        parts = module.split(".")
        return ".".join([*parts[: len(parts) - drop], *([node.module] if node.module else [])])

    def _file(self, module: str) -> Path | None:
        parts = module.split(".")
        if parts[0] != self._package:
            return None
        path = self._root.joinpath(*parts)
        candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
        return next((candidate for candidate in candidates if candidate.is_file()), None)


def bindings(body: Iterable[ast.stmt], name: str, for_checkers: bool = False) -> Iterator[ast.AST]:
    """What gives `name` a meaning among these statements: definitions, imports (of one name), values.

    What stands under TYPE_CHECKING does not exist at run time, and counts only `for_checkers`.
    """
    for statement in body:
        if isinstance(statement, Definition):
            if statement.name == name and "overload" not in map(_last_word, statement.decorator_list):
                yield statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            yield from _one_import(statement, name)
        elif isinstance(statement, ast.Assign):
            if any(_binds(target, name) for target in statement.targets):
                yield statement.value
        elif isinstance(statement, ast.AnnAssign):
            if _binds(statement.target, name):
                yield statement.value or statement
        else:
            yield from bindings(_inside(statement, for_checkers), name, for_checkers)


def _one_import(statement: ast.Import | ast.ImportFrom, name: str) -> Iterator[ast.AST]:
    for alias in statement.names:
        bound = alias.asname or alias.name
        if isinstance(statement, ast.Import):
            if bound.split(".")[0] == name:
                yield ast.Import([alias])
        elif bound in (name, "*"):
            yield ast.ImportFrom(statement.module, [alias], statement.level)


def _binds(target: ast.AST, name: str) -> bool:
    return any(
        isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Store)
        for part in ast.walk(target)
    )


def _inside(statement: ast.stmt, for_checkers: bool) -> list[ast.stmt]:
    """The statements that if, try, with and loops hold."""
    held: list[ast.stmt] = []
    unseen = isinstance(statement, ast.If) and _last_word(statement.test) == "TYPE_CHECKING"
    if not unseen or for_checkers:
        held += getattr(statement, "body", [])
    for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        held += part.body
    return [*held, *getattr(statement, "orelse", []), *getattr(statement, "finalbody", [])]


def _last_word(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


@cache
def _sources(root: Path, package: str) -> Sources:
    return Sources(root, package)


def missing_in_source(feature: Feature, root: Path) -> tuple[str, ...]:
    """As `compat.missing_symbols`, of the vLLM whose folder `vllm` lies in `root`."""
    faults = (_fault(compat.read_symbol(text), root) for text in feature.symbols)
    return tuple(dict.fromkeys(fault for fault in faults if fault))


def _fault(symbol: Symbol, root: Path) -> str | None:
    sources = _sources(root, symbol.module.split(".")[0])
    module = sources.module(symbol.module)
    if module is None:
        return symbol.module
    found = [module]
    for part in symbol.path:
        found = [target for owner in found for target in sources.attribute(owner, part)]
    if not found:
        return str(symbol)
    if symbol.first is None:
        return None
    signatures = [sources.parameters(target) for target in found]
    if any(symbol.fits(parameters) for parameters in signatures):
        return None
    return compat.fault_of_parameters(symbol, signatures[-1])


def unpacked(version: str) -> Path:
    """The folder with the Python files of this vLLM, downloaded if it is not there.

    Raises:
        BadSetting: there is no wheel of it, or it cannot be had.
    """
    folder = CACHE / f"vllm-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        wheel = _downloaded(version, Path(scratch))
        files = Path(scratch, "files")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(files, [name for name in archive.namelist() if name.endswith(".py")])
        files.rename(folder)  # whole or not at all
    return folder


def _downloaded(version: str, folder: Path) -> Path:
    """The wheel, in a folder that is thrown away: it is large, and its Python files are not."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    tags = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [*pip, *tags, "--dest", str(folder), f"vllm=={version}"]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        fix = "`pip index versions vllm` lists those that pip can find."
        raise BadSetting(f"vllm=={version}", "could not be downloaded", fix)
    return wheels[0]


def installed() -> dict[str, Path]:
    """Name and folder of the installed vLLM, which is not imported; empty where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return {}
    return {f"installed {compat.installed_version()}": Path(spec.submodule_search_locations[0]).parent}


def table(missing: dict[str, dict[Feature, tuple[str, ...]]]) -> Iterator[str]:
    """The lines to print: feature by version, then what is missing and what that means."""
    yield "feature".ljust(18) + "safety  platform  symbols  " + "".join(f"{name:18}" for name in missing)
    for item in FEATURES:
        counts = [len(found[item]) for found in missing.values()]
        cells = "".join(f"{f'{count} missing' if count else 'ok':18}" for count in counts)
        safety = "yes" if item.safety else "-"
        yield f"{item.name:18}{safety:8}{item.platform:10}{len(item.symbols):<9}{cells}".rstrip()
    for version, found in missing.items():
        for item, symbols in found.items():
            if symbols:
                yield f"\n{version}, {item.name}: {item.off}"
                yield from (f"  {symbol}" for symbol in symbols)


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 where a safety feature lacks a symbol, else 0.

    Raises:
        BadSetting: a version cannot be had.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("versions", nargs="*", metavar="VERSION")
    versions = parser.parse_args(argv).versions
    roots = installed() | {version: unpacked(version) for version in versions}
    missing = {
        version: {item: missing_in_source(item, root) for item in FEATURES} for version, root in roots.items()
    }
    print("\n".join(table(missing)))
    unsafe = any(item.safety and symbols for found in missing.values() for item, symbols in found.items())
    return 1 if unsafe else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
