"""What `vllm-lora diff` prints for people."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from serve.diff_sides import Difference
from serve.module_tables import by_kind
from serve.screen import screen
from vllm_lora_ext.config_difference import SettingDifference, template_lines
from vllm_lora_ext.difference import DIFFERS, SAME, ModuleDifference, Overlap, WeightsDifference
from vllm_lora_ext.spec import printable

if TYPE_CHECKING:
    from train.diff_answers import AnswerDifference

_DEFINITIONS = (
    "norms: Frobenius, of the updates, scaling x B x A; difference: its norm (% of the larger of the two); "
    "cosine: of both updates as vectors; inputs, outputs: overlap of the directions that they read and write "
    "(mean squared cosine of the principal angles) / what random directions would have"
)
_LONGEST = 60  # signs of a setting or a text in a cell
_SHOWN = 8  # other tensors
_TEMPLATE = "chat_template"


def print_difference(found: Difference, one_row_each: bool) -> None:
    """Tables on stdout, only of what differs; a last line sums up."""
    out = screen(stderr=False)
    out.print(_sides_table(found))
    _print_settings(out, found)
    _print_weights(out, found, one_row_each)
    for answer in found.answers:
        _print_answer(out, answer)
    out.print("the two differ" if found.differs else "no difference")


def _sides_table(found: Difference) -> Table:
    table = Table("", "adapter", "type", "rank", "template", "base")
    for which, side in (("first", found.first), ("second", found.second)):
        rank = "-" if side.spec is None else str(side.spec.max_rank)
        base = getattr(found.base, which) or "not named"
        table.add_row(which, printable(side.text), printable(side.peft_type), rank, side.chat.state, base)
    return table


def _print_settings(out: Console, found: Difference) -> None:
    told = {
        "other": "bases: not the same, their configs differ; neither adapter is for the other's base",
        "unknown": "bases: from here it cannot be told whether they are the same",
    }
    if found.base.state in told:
        out.print(told[found.base.state], soft_wrap=True)
    settings = [*found.config, *found.chat]
    if not settings:
        out.print("config and chat settings: the same")
        return
    table = Table("setting", "first", "second", "note")
    for setting in settings:
        table.add_row(printable(setting.name), _value(setting.first), _value(setting.second), setting.note)
    out.print(table)
    for setting in settings:
        for line in _lines_of_template(setting):
            out.print(line, soft_wrap=True)


def _lines_of_template(setting: SettingDifference) -> Iterator[str]:
    if setting.name == _TEMPLATE and setting.first is not None and setting.second is not None:
        yield "chat_template, line by line (- first, + second):"
        lines = template_lines(setting.first, setting.second)
        yield from map(printable, lines or ["only the ends of lines differ"])


def _print_weights(out: Console, found: Difference, one_row_each: bool) -> None:
    types = [printable(side.peft_type) for side in (found.first, found.second)]
    weights = found.weights
    if weights is None:
        line = f"modules: not compared, for the first is {types[0]} and the second {types[1]}"
        out.print(f"{line}; `vllm-lora convert` makes a LoRA of many a type", soft_wrap=True)
        return
    if found.first.spec is None:
        out.print(f"modules: both are {types[0]}, so that only whole tensors are compared", soft_wrap=True)
    if any(module.state != SAME for module in weights.modules):
        out.print((modules_table if one_row_each else kinds_table)(weights))
        out.print(_DEFINITIONS, soft_wrap=True)
    for line in weight_lines(weights):
        out.print(line, soft_wrap=True)


def kinds_table(weights: WeightsDifference) -> Table:
    """A row for each kind of module, such as `q_proj`; a number is the mean of its modules'."""
    modules = weights.modules
    kinds = by_kind(module.kind for module in modules)
    return _table("modules", modules, {kind: [m for m in modules if m.kind == kind] for kind in kinds})


def modules_table(weights: WeightsDifference) -> Table:
    """A row for each module, in the order of the layers."""
    return _table("module", weights.modules, {module.module: [module] for module in weights.modules})


def _table(
    head: str, modules: Sequence[ModuleDifference], rows: Mapping[str, Sequence[ModuleDifference]]
) -> Table:
    """What is one for all modules has no column, so that a table of kinds fits 80 columns."""
    cells: dict[str, Callable[[Sequence[ModuleDifference]], str]] = {}
    if {module.state for module in modules} != {DIFFERS}:
        cells["state"] = _states
    if len({module.ranks for module in modules}) > 1:
        cells["rank"] = lambda these: _pairs([module.ranks for module in these])
    if len({module.scalings for module in modules}) > 1:
        cells["scaling"] = lambda these: _pairs([module.scalings for module in these])
    cells |= _CELLS
    table = Table(head, *cells)
    table.columns[0].no_wrap = True  # others give way: which module it is must be whole
    for name, these in rows.items():
        table.add_row(printable(name), *(cell(these) for cell in cells.values()))
    return table


def _states(modules: Sequence[ModuleDifference]) -> str:
    states = [module.state for module in modules]
    if len(states) == 1:
        return states[0]
    return "\n".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _norms(modules: Sequence[ModuleDifference]) -> str:
    first, second = (_mean([module.norms[side] for module in modules], _number) for side in (0, 1))
    return f"{first} / {second}"


def _differences(modules: Sequence[ModuleDifference]) -> str:
    if all(module.difference_norm is None for module in modules):
        return "-"
    norm = _mean([module.difference_norm for module in modules], _number)
    return f"{norm} ({_mean([module.relative for module in modules], _percent)})"


def _cosines(modules: Sequence[ModuleDifference]) -> str:
    return _mean([module.cosine for module in modules], lambda value: f"{value:z.3f}")


_CELLS: Mapping[str, Callable[[Sequence[ModuleDifference]], str]] = {
    "norms": _norms,
    "difference": _differences,
    "cosine": _cosines,
    "inputs": lambda modules: _overlaps([module.inputs for module in modules]),
    "outputs": lambda modules: _overlaps([module.outputs for module in modules]),
}


def weight_lines(weights: WeightsDifference) -> list[str]:
    """Sums over all modules, what is to be said of some, and what is no LoRA matrix and not the same."""
    lines = _sums(weights) if weights.modules else []
    for note in sorted({module.note for module in weights.modules if module.note}):
        these = [printable(module.module) for module in weights.modules if module.note == note]
        lines.append(f"{len(these)} modules, for example {these[0]}: {note}")
    if weights.unknown:
        lines.append(f"{weights.unknown} modules could not be compared, and are in none of these numbers")
    for other in weights.others[:_SHOWN]:
        note = f" ({other.note})" if other.note else ""
        lines.append(f"{other.what}, {printable(other.name)}: {other.state}{note}")
    if len(weights.others) > _SHOWN:
        lines.append(f"and {len(weights.others) - _SHOWN} more tensors")
    return lines or ["weights: the same"]


def _sums(weights: WeightsDifference) -> list[str]:
    same = sum(module.state == SAME for module in weights.modules)
    line = f"all: {same} of {len(weights.modules)} modules the same"
    if same < len(weights.modules):
        first, second = map(_number, weights.norms)
        line += f"; norms {first} and {second}, of the difference {_number(weights.difference_norm)}"
        if any(weights.norms):
            line += f" ({_percent(weights.difference_norm / max(weights.norms))})"
        if weights.cosine is not None:
            line += f"; cosine {weights.cosine:z.4f}"
    ranks, scalings = (_one([getattr(m, name) for m in weights.modules]) for name in ("ranks", "scalings"))
    told = [f"rank {ranks}"] * bool(ranks) + [f"scaling {scalings}"] * bool(scalings)
    return [line, f"each module: {', '.join(told)}"] if told else [line]


def _print_answer(out: Console, answer: AnswerDifference) -> None:
    alike = "" if answer.asked_alike else " (asked by two prompts, for the chat settings differ)"
    out.print(f"\n> {answer.prompt}{alike}", soft_wrap=True)
    if not answer.differs:
        out.print(f"both: {answer.first}", soft_wrap=True)
        return
    out.print(f"first:  {answer.first}\nsecond: {answer.second}", soft_wrap=True)
    if (parting := answer.parting) is None:
        return
    before = f", behind {_short(parting.before[-_LONGEST:])}" if parting.before else ""
    out.print(f"they part at token {parting.position + 1}{before}:", soft_wrap=True)
    table = Table("", *map(_token, parting.texts))
    for which, logprobs in zip(("first", "second"), parting.logprobs, strict=True):
        table.add_row(f"log-probability, {which}", *map(_logprob, logprobs))
    out.print(table)


def _token(text: str | None) -> str:
    return "(ended by a stop string)" if text is None else repr(text)


def _logprob(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ({math.exp(value):.2%})"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    return _short(value) if isinstance(value, str) else _short(json.dumps(value, ensure_ascii=False), str)


def _short(text: str, shown: Callable[[str], str] = repr) -> str:
    return shown(text) if len(text) <= _LONGEST else f"{shown(text[: _LONGEST - 3])}..."


def _number(value: float) -> str:
    return f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g}%"


def _pairs(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """What the first and the second have, once if it is the same."""
    texts = {
        "/".join(dict.fromkeys("-" if value is None else _number(value) for value in pair)) for pair in pairs
    }
    return texts.pop() if len(texts) == 1 else f"{len(texts)} different"


def _one(pairs: Sequence[tuple[float | None, float | None]]) -> str:
    """What all modules have; empty if they do not agree."""
    return _pairs(pairs) if len(set(pairs)) == 1 else ""


def _overlaps(overlaps: Sequence[Overlap | None]) -> str:
    known = [item for item in overlaps if item is not None]
    if not known:
        return "-"
    value, chance = (sum(numbers) / len(known) for numbers in zip(*map(_numbers, known), strict=True))
    return f"{value:.2f} / {chance:.2f}"


def _numbers(overlap: Overlap) -> tuple[float, float]:
    return overlap.value, overlap.chance


def _mean(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    return shown(sum(known) / len(known)) if known else "-"
