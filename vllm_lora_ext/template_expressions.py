"""Walk the expressions of a chat template, and the calls of its macros; see `template_walk`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from jinja2 import nodes

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

MAX_COPIES = 10_000  # of one piece of the request, in one text
MAX_STEPS = 100_000  # expressions walked, macro calls written out
SHORTEN = "Write the text once, and use it once."
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
    whose name is `macros[-1]` and whose parameters have the paths in `parameters`.
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

    def inner(self) -> Scope:
        """The same place, with variables of its own."""
        return replace(self, variables=dict(self.variables))


@dataclass
class ExpressionWalk(ABC):
    """What a walk knows, and its half for expressions; the other half, for statements, is a subclass."""

    tree: nodes.Template
    _macros: dict[str, list[nodes.Macro]] = field(default_factory=dict)
    _globals: dict[str, Value] = field(default_factory=dict)
    _uncounted: set[str] = field(default_factory=set)  # namespace fields that may hold more than a count
    _grown: set[str] = field(default_factory=set)  # namespace fields that are set in a loop
    _self_calls: list[tuple[Path, tuple[Fact, ...]]] = field(default_factory=list)  # on one way
    _steps: int = 0
    _names: int = 0

    @abstractmethod
    def _body(self, body: Iterable[nodes.Node], scope: Scope) -> Value:
        """What statements write."""

    def _new_name(self, kind: str) -> str:
        self._names += 1
        return f"{kind}{self._names}"

    def _step(self, node: nodes.Node) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            rule = "calls macros that call macros so often that it never ends"
            raise ConstructRefused(node.lineno, rule, "Call each macro where it is needed only.")

    def _limited(self, node: nodes.Node, value: Value) -> Value:
        if value.copies > MAX_COPIES:
            rule = f"makes a text that repeats the same part more than {MAX_COPIES:,} times"
            raise ConstructRefused(node.lineno, rule, SHORTEN)
        return value

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
                return self._one_of([partial(self._value, other, scope) for other in others])
            case nodes.And() | nodes.Or():
                return either(self._all([node.left, node.right], scope))
            case nodes.Test():
                asked = [] if isinstance(node.node, nodes.Name) else [node.node]  # `a_macro is defined`
                self._all([*asked, *node.args, *node.kwargs], scope)
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
        base = self._value(node.node, scope)
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return Value(copies=0, counted=node.attr in _COUNTERS)
        if base.fields is not None:
            found = base.fields.get(node.attr, Value())
            if node.attr in self._grown:  # it may hold more than is known here
                found = replace(found, path=None, literal=False)
            return replace(found, counted=found.counted and node.attr not in self._uncounted)
        return base.part(node.attr)

    def _item(self, node: nodes.Getitem, scope: Scope) -> Value:
        base, key = self._value(node.node, scope), self._value(node.arg, scope)
        if isinstance(node.arg, nodes.Slice):
            return replace(base, counted=False)
        if base.fields is not None:
            return Value()
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
            base = self._value(node.node.node, scope)
            values = self._all([*node.args, *node.kwargs, *rest], scope)
            if base.fields is None:
                return method_result(node, node.node.attr, base, values)
        name = node.node.name if isinstance(node.node, nodes.Name) else None
        if name in self._macros:
            return self._macro_call(node, name, scope)
        if name not in _FUNCTIONS:
            what = f"`{name}`" if name else "an expression"
            rule = f"calls {what}, which is no function, macro or method that is known"
            raise ConstructRefused(node.lineno, rule, f"Call one of {', '.join(sorted(_FUNCTIONS))}.")
        values = self._all([*node.args, *node.kwargs, *rest], scope)
        if name == "range":
            return number_range(node, values)
        if name == "namespace":
            fields = {item.key: self._value(item.value, scope) for item in node.kwargs}
            self._uncounted.update(key for key, value in fields.items() if not value.counted)
            return Value(fields=fields)
        return replace(NOTHING, size=30) if name == "strftime_now" else joined(values)

    def _macro_call(self, node: nodes.Call, name: str, scope: Scope) -> Value:
        """Walk the macro with the arguments of this call, unless it is calling itself."""
        by_place = self._all(node.args, scope)
        by_name = {item.key: self._value(item.value, scope) for item in node.kwargs}
        given = [*by_place, *by_name.values()]
        self._all([part for part in (node.dyn_args, node.dyn_kwargs) if part], scope)
        made = []
        for macro in self._macros[name]:
            names = [argument.name for argument in macro.args]
            arguments = dict(zip(names, by_place, strict=False)) | by_name
            if name in scope.macros:
                self._judge_self_call(node, name, arguments, scope)
                made.append(joined(given))
            else:
                made.append(self._macro_text(macro, arguments, scope))
        return replace(either(made), path=None, counted=False, literal=False, fields=None)

    def _macro_text(self, macro: nodes.Macro, arguments: dict[str, Value], scope: Scope) -> Value:
        variables = dict(self._globals)
        inside = replace(scope, variables=variables, loops=(), macros=(*scope.macros, macro.name))
        defaults = dict(zip([item.name for item in macro.args[::-1]], macro.defaults[::-1], strict=False))
        for item in macro.args:
            self._refuse_function_name(item, item.name)
            if item.name in arguments:
                value = arguments[item.name]
            elif item.name in defaults:
                value = self._value(defaults[item.name], inside)
            else:
                value = Value()
            path = (self._new_name("?"),) if value.path is None else value.path
            variables[item.name] = replace(value, path=path)
        paths = {item.name: variables[item.name].path or () for item in macro.args}
        before, self._self_calls = self._self_calls, []
        text = self._body(macro.body, replace(inside, parameters=paths))
        self._self_calls = before
        return self._limited(macro, text)

    def _judge_self_call(
        self, node: nodes.Call, name: str, arguments: dict[str, Value], scope: Scope
    ) -> None:
        """A macro may call itself on a part of its argument, and on no part of it twice."""
        rule = f"calls the macro `{name}` in a circle"
        fix = "Let a macro call itself on a part of its own argument, or not at all."
        if scope.macros[-1] != name:
            raise ConstructRefused(node.lineno, rule, fix)
        for key, whole in scope.parameters.items():
            path = arguments[key].path if key in arguments else None
            if path is None or path[: len(whole)] != whole:
                continue
            below = path[len(whole) :]
            if (below or not path) and set(scope.loops) <= set(below):
                if any(_overlap((path, scope.facts), other) for other in self._self_calls):
                    rule = f"lets the macro `{name}` call itself twice on the same part"
                    raise ConstructRefused(node.lineno, rule, "Keep the result in a variable.")
                self._self_calls.append((path, scope.facts))
                return
        rule = f"lets the macro `{name}` call itself, and not on a part of its argument"
        raise ConstructRefused(node.lineno, rule, fix)


def _overlap(one: tuple[Path, tuple[Fact, ...]], other: tuple[Path, tuple[Fact, ...]]) -> bool:
    """Whether two calls may see the same part of the argument, in one run of the macro."""
    if any(fact.excludes(counter) for fact in one[1] for counter in other[1]):
        return False
    pairs = zip(one[0], other[0], strict=False)
    return all(a == b or a.startswith("*") or b.startswith("*") for a, b in pairs)
