"""What an expression of a chat template can make at most, judged without rendering it.

A `Value` is all that the judge knows about an expression: from which part of the request it comes, how
often it repeats what it comes from, and how long it is if the template itself spells it out. The rules
for operators, filters and methods are here; `vllm_lora_ext.chat_template` walks the template.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jinja2 import nodes

MAX_LITERAL = 1_000  # runs of a loop over what the template itself spells out; the largest range
MAX_WIDTH = 200  # for what widens text: a field width, an indent
MAX_FACTOR = 100  # in a multiplication
_LITERAL_WEIGHT = 10_000  # this many characters of the template weigh as one copy of request data

# Filters that make at most as much as they are given, `method` or not. Any other filter is refused.
# fmt: off
_PLAIN_FILTERS = frozenset([
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "filesizeformat",
    "first", "float", "forceescape", "groupby", "int", "items", "last", "length", "list", "lower", "map",
    "max", "min", "pprint", "random", "reject", "rejectattr", "reverse", "safe", "select", "selectattr",
    "sort", "string", "striptags", "sum", "title", "trim", "unique", "upper", "urlencode", "wordcount",
])
# fmt: on
_WIDENING_FILTERS = frozenset(
    ["batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"]
)
_WIDENING_METHODS = frozenset(["center", "expandtabs", "ljust", "rjust", "zfill"])
_METHODS = (
    frozenset(name for kind in (str, dict, list) for name in dir(kind) if not name.startswith("_"))
    | {"changed", "cycle", "isoformat", "strftime"}
) - {"format_map", "maketrans", "translate"}
_NUMBERS_OF_UNKNOWN_SIZE = frozenset(["abs", "float", "int", "round", "sum"])
_LENGTHS = frozenset(["count", "length", "wordcount"])
_TOKENS = frozenset((f"{name}_token",) for name in ("bos", "eos", "pad", "unk"))
_TOKEN_LENGTH = 32  # characters
_SAFE_FORMAT = re.compile(r"(?!.*(\d{4}|%[^a-zA-Z%]*\*|\{[^}]*\{))", re.DOTALL)

Path = tuple[str, ...]


class ConstructRefused(ValueError):
    """An expression or statement that a template may not have: `line`, what it does, and the fix."""

    def __init__(self, line: int, rule: str, fix: str) -> None:
        self.line, self.rule, self.fix = line, rule, fix
        super().__init__(rule)


@dataclass(frozen=True)
class Value:
    """An upper bound for what an expression makes.

    `path` leads to the part of the request that it is, or is made of: `()` for what the template spells
    out itself, None for what is unknown. A name that begins with `*` stands for any part.
    `copies`: how often it repeats that part; `holds`: how often it repeats what the template keeps (see
    `template_growth`); `power`: to which power of the request's size it can grow, less one.
    `size`: the greatest number or longest text written down in it; `items`: over how many a loop would
    run if `literal`; `inner`: the same one level further down. `counted`: a whole number no greater
    than the request is long. `namespace`: it may be a namespace.
    """

    path: Path | None = None
    copies: float = 1
    holds: Mapping[str, float] = field(default_factory=dict)
    power: int = 0
    size: int = 0
    items: int = 0
    inner: int = 0
    counted: bool = False
    literal: bool = False
    namespace: bool = False

    def part(self, key: str) -> Value:
        """What is found inside under `key`."""
        path = self.path and (*self.path, key)
        return replace(self, path=path, counted=False, items=self.inner, namespace=False)

    def times(self, factor: float) -> Value:
        """The same, as often."""
        holds = {name: count * factor for name, count in self.holds.items()}
        whole = math.ceil(factor)
        return replace(
            self, copies=self.copies * factor, holds=holds, size=self.size * whole, items=self.items * whole
        )


NOTHING = Value(path=(), copies=0, literal=True)


def constant(value: object) -> Value:
    """The value of a number or a text in the template."""
    if isinstance(value, str):
        length = len(value)
        return replace(NOTHING, copies=length / _LITERAL_WEIGHT, size=length, items=length)
    if isinstance(value, int | float) and not isinstance(value, bool):
        size = abs(value)
        whole = isinstance(value, int)
        return replace(NOTHING, size=int(min(size, 1e18)), counted=whole and size <= MAX_LITERAL)
    return NOTHING


def joined(values: Sequence[Value]) -> Value:
    """All of them together, as in a list or a concatenation."""
    return Value(
        path=_common_path(values),
        copies=sum(value.copies for value in values),
        holds=_held(values, together=True),
        power=max((value.power for value in values), default=0),
        size=sum(value.size for value in values),
        items=sum(value.items for value in values),
        inner=max((value.inner for value in values), default=0),
        counted=bool(values) and all(value.counted for value in values),
        literal=all(value.literal for value in values),
    )


def either(values: Sequence[Value]) -> Value:
    """One of them, nobody knows which, as in a condition."""
    return Value(
        path=_common_path(values),
        copies=max(value.copies for value in values),
        holds=_held(values, together=False),
        power=max(value.power for value in values),
        size=max(value.size for value in values),
        items=max(value.items for value in values),
        inner=max(value.inner for value in values),
        counted=all(value.counted for value in values),
        literal=all(value.literal for value in values),
        namespace=any(value.namespace for value in values),
    )


def _held(values: Sequence[Value], together: bool) -> Mapping[str, float]:
    """What all of them hold, or at most one of them."""
    holding = [value.holds for value in values if value.holds]
    if len(holding) < 2:
        return holding[0] if holding else {}
    holds = dict(holding[0])
    for more in holding[1:]:
        for name, count in more.items():
            holds[name] = holds.get(name, 0) + count if together else max(holds.get(name, 0), count)
    return holds


def listed(values: Sequence[Value]) -> Value:
    """A list, tuple or dict that is written down: as long as it is, whatever is in it."""
    inner = max((max(value.items, value.inner) for value in values), default=0)
    return replace(joined(values), items=len(values), inner=inner, counted=False, literal=True)


def _common_path(values: Sequence[Value]) -> Path | None:
    """The smallest part of the request that holds all; what the template spells out does not count."""
    paths = [value.path for value in values if value.path != ()]
    if not paths:
        return ()
    common: list[str] = []
    for keys in zip(*(path or () for path in paths), strict=False):
        if len(set(keys)) > 1:
            break
        common.append(keys[0])
    return tuple(common) or None


def multiplied(node: nodes.Mul, left: Value, right: Value) -> Value:
    """Number by number, or text by a number that cannot be large.

    Raises:
        ConstructRefused: anything else.
    """
    for number, other in ((left, right), (right, left)):
        if number.path == () and number.counted and number.size <= MAX_FACTOR:
            return other.times(max(number.size, 1))
        if number.counted and (other.counted or (other.path == () and other.size <= MAX_FACTOR)):
            widened = number if other.counted else number.times(max(other.size, 1))
            both = joined([widened, other])  # the product of two counts is none
            return replace(both, path=None, counted=False, literal=False, power=both.power + 1)
    rule = "multiplies (`*`) with what may be a large number"
    raise ConstructRefused(node.lineno, rule, f"Multiply with a number of at most {MAX_FACTOR}.")


def remainder(node: nodes.Mod, left: Value, right: Value) -> Value:
    """`%` on numbers, or a text that fills in values without widening them; raises as `multiplied`."""
    if not (left.counted and right.counted) and not is_safe_format(node.left):
        rule = "uses `%` on what may be a text, which can make a text of any length"
        raise ConstructRefused(node.lineno, rule, "Use it on counts alone, or join texts with `~`.")
    return joined([left, right])


def is_safe_format(node: nodes.Node | None) -> bool:
    """Whether it is a text written down whose fields have no width worth mentioning."""
    return isinstance(node, nodes.Const) and bool(_SAFE_FORMAT.match(str(node.value)))


def number_range(node: nodes.Call, values: Sequence[Value]) -> Value:
    """What `range` makes; raises ConstructRefused when that may be long."""
    whole = joined(values)
    if not whole.counted or whole.size > MAX_LITERAL or whole.copies > MAX_FACTOR:
        rule = f"uses `range` with what may be more than {MAX_LITERAL:,}"
        raise ConstructRefused(node.lineno, rule, "Loop over messages, tools or their lengths.")
    return replace(whole, items=whole.size, counted=True, literal=whole.path == ())


def filtered(node: nodes.Filter, base: Value, values: Sequence[Value]) -> Value:
    """What a filter makes of `base`, its arguments being `values`.

    Raises:
        ConstructRefused: one that can make much of little.
    """
    name = node.name
    if name in _LENGTHS:
        return replace(joined([base, *values]), path=None, counted=True, literal=False, size=0)
    if name in ("abs", "int") and base.counted and not values:
        return base
    if name in _NUMBERS_OF_UNKNOWN_SIZE:
        return replace(joined([base, *values]), path=None, counted=False, literal=False)
    if name == "map" and node.args:  # map('upper'): a filter, by name
        first = node.args[0]
        inner = first.value if isinstance(first, nodes.Const) else None
        _allow(node, f"map({inner!r})", inner in _PLAIN_FILTERS or (inner == "tojson" and not node.args[1:]))
    return _changed(node, name, "the filter", node.node, base, values)


def method_result(node: nodes.Call, name: str, base: Value, values: Sequence[Value]) -> Value:
    """What a method of a text, a list or a dict makes; raises as `filtered`."""
    owner = node.node.node if isinstance(node.node, nodes.Getattr) else None
    if name == "get" and node.args and isinstance(node.args[0], nodes.Const):
        return either([base.part(str(node.args[0].value)), *values[1:]])
    if name == "join":  # here the separator comes first
        base, values = joined(values), [base]
    return _changed(node, name, "the method", owner, base, values)


def _changed(
    node: nodes.Filter | nodes.Call,
    name: str,
    kind: str,
    owner: nodes.Node | None,
    base: Value,
    values: Sequence[Value],
) -> Value:
    """The rules that filters and methods share."""
    what = f"{kind} `{name}`"
    literal = all(value.path == () for value in values)
    if name in (_WIDENING_FILTERS if kind == "the filter" else _WIDENING_METHODS):
        _allow(node, f"{what} with a width above {MAX_WIDTH}", literal and joined(values).size <= MAX_WIDTH)
        return replace(base, counted=False, literal=False)
    if name == "replace":
        token = len(values) > 1 and _is_token(values[1])
        constants = len(values) > 1 and all(value.path == () for value in [*values[:1], *values[2:]])
        known = constants and (token or values[1].path == ())
        _allow(node, f"{what} with a replacement that is no constant", known)
        old, new = values[0].size, values[1].size
        if token:
            base = replace(base, power=base.power + 1)
            new += math.ceil(values[1].copies * _TOKEN_LENGTH)
        return base.times(max(1, new if old == 0 else -(-new // old)))
    if name == "join":
        _allow(node, f"{what} with a separator that is no constant", literal)
        return joined([base, *values])
    if name == "format":
        _allow(node, f"{what} on what is no plain constant", is_safe_format(owner))
        return joined([base, *values])
    _allow(node, what, name in (_PLAIN_FILTERS if kind == "the filter" else _METHODS))
    if name in ("items", "dictsort"):
        return replace(base.part("*items"), items=base.items)
    if name in ("first", "last"):
        return base.part("*")
    if name in ("default", "d"):
        return either([base, *values])
    return replace(
        joined([base, *values]), path=base.path, items=base.items, counted=False, literal=base.literal
    )


def _is_token(value: Value) -> bool:
    """Whether it is one of the model's special tokens, which are short."""
    return value.path in _TOKENS and not value.holds


def _allow(node: nodes.Node, what: str, allowed: bool) -> None:
    if not allowed:
        rule = f"uses {what}, which can make much of little"
        raise ConstructRefused(node.lineno, rule, "Write it without, or with constants.")
