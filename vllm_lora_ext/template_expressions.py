"""Walk the expressions of a chat template; see `template_walk`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from jinja2 import nodes

from vllm_lora_ext.template_growth import MAX_COPIES, SHORTEN, Growth, Setting
from vllm_lora_ext.template_values import (
    NOTHING,
    ConstructRefused,
    Path,
    Value,
    constant,
    either,
    filtered,
    joined,
    listed,
    method_result,
    multiplied,
    number_range,
    remainder,
)

MAX_STEPS = 100_000  # expressions walked, macro calls written out
_FUNCTIONS = frozenset(["range", "namespace", "dict", "raise_exception", "strftime_now"])
_COUNTERS = frozenset(["index", "index0", "revindex", "revindex0", "length", "depth", "depth0"])
_ANY = "*"  # some part, nobody knows which


@dataclass(frozen=True)
class Fact:
    """That an expression equals a constant, where a condition says so; `paths` are those of its names."""

    asked: nodes.Node
    paths: tuple[Path | None, ...]
    answer: object

    def excludes(self, other: Fact) -> bool:
        """Whether both cannot be true of the same thing."""
        return self.paths == other.paths and self.asked == other.asked and self.answer != other.answer


@dataclass(frozen=True)
class Scope:
    """Where the walk is: the variables, and the loops and macros around it.

    `element` is the path of the innermost loop's variable; `nested` counts the loops that multiply and
    `repeats` the runs of those over literals. `loops` are the loops since the innermost macro began,
    whose name is `macros[-1]` and whose parameters have the paths in `parameters`. `controls` is what is
    held by the lists that loops go over: what is set there happens as often as those are long.
    """

    variables: dict[str, Value]
    element: Path | None = None
    nested: int = 0
    repeats: int = 1
    looping: bool = False
    loops: tuple[str, ...] = ()
    macros: tuple[str, ...] = ()
    parameters: Mapping[str, Path] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()
    controls: Mapping[str, float] = field(default_factory=dict)

    def inner(self) -> Scope:
        """The same place, with variables of its own."""
        return replace(self, variables=dict(self.variables))


@dataclass
class ExpressionWalk(ABC):
    """What a walk knows, and its half for expressions; the other half, for statements, is a subclass."""

    tree: nodes.Template
    _macros: dict[str, list[nodes.Macro]] = field(default_factory=dict)
    _globals: dict[str, Value] = field(default_factory=dict)
    _fields: dict[str, Value] = field(default_factory=dict)  # of namespaces, as the walk before found them
    _found: dict[str, list[Value]] = field(default_factory=dict)  # what they are set to in this walk
    _growth: Growth = field(default_factory=Growth)
    _sites: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of self-calls: the loops around
    _self_calling: frozenset[str] = frozenset()  # macros
    _self_calls: list[tuple[Path, tuple[Fact, ...]]] = field(default_factory=list)  # on one way
    _steps: int = 0
    _names: int = 0

    @abstractmethod
    def _body(self, body: Iterable[nodes.Node], scope: Scope) -> Value:
        """What statements write."""

    @abstractmethod
    def _macro_call(self, node: nodes.Call, name: str, scope: Scope) -> Value:
        """What a call of a macro writes."""

    def _new_name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def _step(self, node: nodes.Node) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            rule = "calls macros that call macros so often that it never ends"
            raise ConstructRefused(node.lineno, rule, "Call each macro where it is needed only.")

    def _limited(self, node: nodes.Node, value: Value) -> Value:
        if value.copies + self._growth.weight(value.holds) > MAX_COPIES:
            rule = f"makes a text that repeats the same part more than {MAX_COPIES:,} times"
            raise ConstructRefused(node.lineno, rule, SHORTEN)
        return value

    def _keep(self, node: nodes.Node, name: str, value: Value, scope: Scope, nested: int) -> None:
        """Note that something that outlives a run of a loop, or of a macro, gets this value."""
        if not self._sites.keys().isdisjoint(value.holds):
            rule = f"keeps in `{name}` what a macro that calls itself wrote"
            raise ConstructRefused(node.lineno, rule, "Write it at once, or keep it in a variable.")
        setting = Setting(node.lineno, name, value.holds, value.copies, value.power, nested, scope.repeats)
        self._growth.settings.append(setting)

    def _set_field(self, node: nodes.Node, name: str, value: Value, scope: Scope) -> None:
        if value.namespace:
            self._refuse_namespace(node)
        self._limited(node, value)
        self._found.setdefault(name, []).append(value)
        held = joined([value, Value(copies=0, holds=scope.controls)]).holds
        own = len(scope.macros) and scope.macros[-1] in self._self_calling  # one more loop, as it were
        self._keep(node, name, replace(value, holds=held), scope, scope.nested + own)

    def _field(self, name: str) -> Value:
        """What stands in a field of some namespace: it is told apart from others by its name alone."""
        known = self._fields.get(name, Value(counted=True))
        return replace(known, copies=0, power=0, holds={name: 1})

    def _refuse_namespace(self, node: nodes.Node) -> None:
        rule = "uses a namespace other than for its fields"
        raise ConstructRefused(node.lineno, rule, "Write `ns.field`, and hand on the field.")

    def _one_of(self, walks: Iterable[Callable[[], Value]]) -> Value:
        """Walks that exclude each other: a macro may call itself in each of them."""
        before = self._self_calls
        after = list(before)
        values = []
        for walk in walks:
            self._self_calls = list(before)
            values.append(walk())
            after += self._self_calls[len(before) :]
        self._self_calls = after
        return either(values)

    def _refuse_function_name(self, node: nodes.Node, name: str) -> None:
        if name in _FUNCTIONS or name in self._macros:
            rule = f"uses `{name}`, the name of a function or macro, as a variable"
            raise ConstructRefused(node.lineno, rule, "Rename the variable.")

    def _all(self, found: Iterable[nodes.Node], scope: Scope) -> list[Value]:
        return [self._value(node, scope) for node in found]

    def _value(self, node: nodes.Node, scope: Scope) -> Value:
        value = self._any(node, scope)
        if value.namespace:  # in a list or a text nobody would see what is read of it
            self._refuse_namespace(node)
        return value

    def _any(self, node: nodes.Node, scope: Scope) -> Value:
        """The value of an expression, which may be a namespace."""
        self._step(node)
        match node:
            case nodes.Const():
                return constant(node.value)
            case nodes.TemplateData():
                return constant(node.data)
            case nodes.Name():
                self._refuse_function_name(node, node.name)
                return scope.variables.get(node.name, Value((node.name,)))
            case nodes.Getattr():
                return self._attribute(node, scope)
            case nodes.Getitem():
                return self._item(node, scope)
            case nodes.List() | nodes.Tuple():
                return listed(self._all(node.items, scope))
            case nodes.Dict():
                return listed([joined(self._all([pair.key, pair.value], scope)) for pair in node.items])
            case nodes.Filter():
                return self._filter(node, None, scope)
            case nodes.Call():
                return self._call(node, scope)
            case _:
                return self._operator(node, scope)

    def _operator(self, node: nodes.Node, scope: Scope) -> Value:
        match node:
            case nodes.CondExpr():
                self._value(node.test, scope)
                others = [node.expr1, *([node.expr2] if node.expr2 else [])]
                return self._one_of([partial(self._any, other, scope) for other in others])
            case nodes.And() | nodes.Or():
                return either([self._any(node.left, scope), self._any(node.right, scope)])
            case nodes.Test():
                asked = [] if isinstance(node.node, nodes.Name) else [node.node]  # `a_macro is defined`
                for part in [*asked, *node.args, *node.kwargs]:
                    self._any(part, scope)
                return NOTHING
            case nodes.Not() | nodes.Compare():
                self._all(node.iter_child_nodes(), scope)
                return NOTHING
            case nodes.Mul():
                return multiplied(node, self._value(node.left, scope), self._value(node.right, scope))
            case nodes.Mod():
                return remainder(node, self._value(node.left, scope), self._value(node.right, scope))
            case nodes.Pow():
                raise ConstructRefused(node.lineno, "uses the power `**`", "Write the number.")
            case nodes.Div():
                return replace(joined(self._all([node.left, node.right], scope)), path=None, counted=False)
            case _:
                return joined(self._all(node.iter_child_nodes(), scope))

    def _attribute(self, node: nodes.Getattr, scope: Scope) -> Value:
        base = self._any(node.node, scope)
        if isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in _COUNTERS:
            return Value(counted=True)
        return self._field(node.attr) if base.namespace else base.part(node.attr)

    def _item(self, node: nodes.Getitem, scope: Scope) -> Value:
        base, key = self._any(node.node, scope), self._value(node.arg, scope)
        if base.namespace:
            if isinstance(node.arg, nodes.Const):
                return self._field(str(node.arg.value))
            self._refuse_namespace(node)
        if isinstance(node.arg, nodes.Slice):
            return replace(base, counted=False)
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return base.part(node.arg.value)
        if base.path and key.path and key.path[:-1] == base.path:  # data[key], in a loop over the keys
            return base.part(key.path[-1])
        return base.part(_ANY)

    def _filter(self, node: nodes.Filter, block: Value | None, scope: Scope) -> Value:
        """A filter of an expression; of the text of `block`, if that is given."""
        base = self._value(node.node, scope) if node.node else block or NOTHING
        return filtered(node, base, self._all([*node.args, *node.kwargs], scope))

    def _call(self, node: nodes.Call, scope: Scope) -> Value:
        rest = [part for part in (node.dyn_args, node.dyn_kwargs) if part]
        if isinstance(node.node, nodes.Getattr):
            base = self._any(node.node.node, scope)
            values = self._all([*node.args, *node.kwargs, *rest], scope)
            if not base.namespace:
                return method_result(node, node.node.attr, base, values)
        name = node.node.name if isinstance(node.node, nodes.Name) else None
        if name in self._macros:
            return self._macro_call(node, name, scope)
        if name not in _FUNCTIONS:
            what = f"`{name}`" if name else "an expression"
            rule = f"calls {what}, which is no function, macro or method that is known"
            raise ConstructRefused(node.lineno, rule, f"Call one of {', '.join(sorted(_FUNCTIONS))}.")
        if name == "namespace":
            return self._namespace(node, scope)
        values = self._all([*node.args, *node.kwargs, *rest], scope)
        if name == "range":
            return number_range(node, values)
        return replace(NOTHING, size=30) if name == "strftime_now" else joined(values)

    def _namespace(self, node: nodes.Call, scope: Scope) -> Value:
        if node.args or node.dyn_args or node.dyn_kwargs:
            rule = "calls `namespace` with a dict"
            raise ConstructRefused(node.lineno, rule, "Name each field: `namespace(found=false)`.")
        for item in node.kwargs:
            self._set_field(node, item.key, self._value(item.value, scope), scope)
        return Value(copies=0, namespace=True)
