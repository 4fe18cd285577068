"""`vllm-lora show DIR --trace TEXT`: what each layer of base and adapter puts out for one prompt."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from serve.module_tables import by_kind
from serve.screen import screen
from vllm_lora_ext.spec import printable

if TYPE_CHECKING:
    from train.trace import ModuleTrace, NextToken, Trace

_COLUMNS = 4  # kinds of modules side by side, so that a table fits 80 columns
_UNTRACED = 3  # shown
_DEFINITIONS = (
    "sizes are root mean squares over tokens and features; of a module: base's output + adapter's share, in %"
)


def show_trace(args: argparse.Namespace) -> int:
    """Load base and adapter, ask once, and print what was seen."""
    from train.trace import trace_adapter

    trace = trace_adapter(Path(args.adapter), args.trace, args.base_model, args.allow)
    if args.json:
        print(json.dumps(dataclasses.asdict(trace), ensure_ascii=False, indent=2))
        return 0
    out = screen(stderr=False)
    out.print(f"{trace.tokens} tokens: {trace.prompt!r}", soft_wrap=True)
    for table in module_tables(trace):
        out.print(table)
    out.print(stream_table(trace))
    out.print(_DEFINITIONS, soft_wrap=True)
    out.print(next_table(trace))
    out.print(f"KL(adapter || base) of the next token: {trace.divergence:.3g} nats")
    if trace.untraced:
        names = ", ".join(map(printable, trace.untraced[:_UNTRACED]))
        out.print(f"nothing seen of {len(trace.untraced)} modules, for example {names}", soft_wrap=True)
    return 0


def module_tables(trace: Trace) -> Iterator[Table]:
    """A row for each layer, a column for each kind of module, four kinds to a table.

    A cell reads: size of the base's output, + size of the adapter's share, and that in % of the first.
    """
    kinds = by_kind(_kind(module) for module in trace.modules)
    for first in range(0, len(kinds), _COLUMNS):
        these = kinds[first : first + _COLUMNS]
        table = Table("layer", *map(printable, these))
        modules = [module for module in trace.modules if _kind(module) in these]
        for layer in _layers(modules):
            of_layer = [module for module in modules if module.layer == layer]
            cells = [_cell([module for module in of_layer if _kind(module) == kind]) for kind in these]
            table.add_row("-" if layer is None else str(layer), *cells)
        yield table


def stream_table(trace: Trace) -> Table:
    """The residual stream behind each layer."""
    table = Table("layer", "residual stream of the base", "with the adapter", "moved by")
    for stream in trace.streams:
        moved = f"{short(stream.moved)} {_percent(stream.moved, stream.base)}"
        table.add_row(str(stream.layer), short(stream.base), short(stream.adapter), moved)
    return table


def next_table(trace: Trace) -> Table:
    """The most probable next tokens of both."""
    table = Table("next token of the base", "", "with the adapter", "")
    for base, adapter in zip_longest(trace.base_next, trace.adapter_next):
        table.add_row(*_token(base), *_token(adapter))
    return table


def short(value: float) -> str:
    """A size in at most five characters."""
    if value == 0:
        return "0"
    if not 0.01 <= value < 9999.5:
        return f"{value:.0e}"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _kind(module: ModuleTrace) -> str:
    return module.module.rpartition(".")[2]


def _layers(modules: Sequence[ModuleTrace]) -> list[int | None]:
    """What lies outside the layers comes last."""
    layers = {module.layer for module in modules}
    return sorted(layers, key=lambda layer: math.inf if layer is None else layer)


def _cell(modules: Sequence[ModuleTrace]) -> str:
    """Several modules of a kind in one layer, as experts are, by their root mean square."""
    if not modules:
        return ""
    base, share = (
        math.sqrt(sum(size * size for size in sizes) / len(modules))
        for sizes in ([m.base for m in modules], [m.share for m in modules])
    )
    return f"{short(base)}+{short(share)} {_percent(share, base)}"


def _percent(part: float, whole: float) -> str:
    if not whole:
        return "-" if part else "0%"
    percent = 100 * part / whole
    return f"{percent:.1f}%" if 0 < percent < 9.95 else f"{percent:.0f}%"


def _token(token: NextToken | None) -> tuple[str, str]:
    return (repr(token.text), f"{100 * token.probability:.3g}%") if token else ("", "")
