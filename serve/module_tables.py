"""What `vllm-lora show DIR` says of an adapter's modules: by kind in a few rows, or each in its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.table import Table

from vllm_lora_ext.anatomy import Anatomy
from vllm_lora_ext.spec import printable

# The order in which people speak of them; others follow by name.
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEFINITIONS = (
    "norm: of scaling x B x A, Frobenius; spectral: its largest singular value; "
    "effective rank: exp of the entropy of its singular values"
)
_SHAPES = 2  # of one kind, shown before they are counted


def by_kind(kinds: Iterable[str]) -> list[str]:
    """Kinds of modules, each once: those of attention, of the MLP, then others by name."""
    rank = {kind: index for index, kind in enumerate(_ORDER)}
    return sorted(set(kinds), key=lambda kind: (rank.get(kind, len(rank)), kind))


def kinds_table(anatomy: Anatomy) -> Table:
    """A row for each kind of module, such as `q_proj`; a number is the mean (least to most)."""
    modules = anatomy.modules
    has_notes = any(module.note for module in modules)
    has_dead = any(module.is_dead for module in modules)
    optional = [*(["dead"] if has_dead else []), *(["note"] if has_notes else [])]
    columns = ["modules", "count", "A", "B", "dtype", "scaling", "norm", "effective rank", "share", *optional]
    table = Table(*columns, title=_title(anatomy))
    for kind in by_kind(module.kind for module in modules):
        these = [module for module in modules if module.kind == kind]
        dead = sum(module.is_dead for module in these)
        table.add_row(
            printable(kind),
            str(len(these)),
            _some(_shape(module.a_shape) for module in these),
            _some(_shape(module.b_shape) for module in these),
            _some(module.dtype for module in these),
            _spread([module.scaling for module in these], _number),
            _spread([module.delta_norm for module in these], _number),
            _spread([module.effective_rank for module in these], _rank),
            f"{sum(module.share for module in these):.1%}",
            *([str(dead) if dead else ""] if has_dead else []),
            *([_some(module.note for module in these if module.note)] if has_notes else []),
        )
    return table


def modules_table(anatomy: Anatomy) -> Table:
    """A row for each module, in the order of the layers."""
    notes = ["dead" if module.is_dead else module.note for module in anatomy.modules]
    columns = ["A", "B", "dtype", "scaling", "of A", "of B", "norm", "spectral", "effective rank", "share"]
    table = Table("module", *columns, title=_title(anatomy))
    table.columns[0].no_wrap = True  # others give way: which module it is must be whole
    if any(notes):
        table.add_column("note")
    for module, note in zip(anatomy.modules, notes, strict=True):
        table.add_row(
            printable(module.module),
            _shape(module.a_shape),
            _shape(module.b_shape),
            module.dtype,
            _number(module.scaling),
            _number(module.a_norm),
            _number(module.b_norm),
            _number(module.delta_norm),
            _number(module.spectral_norm),
            _rank(module.effective_rank),
            f"{module.share:.2%}",
            *([note] if any(notes) else []),
        )
    return table


def other_lines(anatomy: Anatomy) -> list[str]:
    """A line for each sort of tensor that is no LoRA."""
    lines = []
    for what in sorted({other.what for other in anatomy.others}):
        these = [other for other in anatomy.others if other.what == what]
        count, share = sum(other.parameters for other in these), sum(other.share for other in these)
        lines.append(
            f"{len(these)} x {what}: {count:,} parameters ({share:.1%}), for example "
            f"{printable(these[0].name)} {_shape(these[0].shape)} {these[0].dtype}"
        )
    return lines


def _title(anatomy: Anatomy) -> str:
    parameters = sum(module.parameters for module in anatomy.modules)
    return f"{len(anatomy.modules)} modules, {parameters:,} parameters"


def _shape(shape: tuple[int, ...] | None) -> str:
    return "-" if shape is None else " x ".join(map(str, shape))


def _some(texts: Iterable[str]) -> str:
    """Different texts, or how many there are."""
    different = sorted(set(texts))
    return "\n".join(different) if len(different) <= _SHAPES else f"{len(different)} different"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _rank(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _spread(values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    least, most = shown(min(known)), shown(max(known))
    mean = shown(sum(known) / len(known))
    return mean if least == most else f"{mean} ({least} to {most})"
