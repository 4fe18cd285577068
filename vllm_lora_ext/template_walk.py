"""Walk a parsed chat template and refuse what could take a server's time or memory.

The walk follows the template as rendering would, macro calls included: every call is walked with the
arguments that it has. What is bounded by the request passes. A loop that walks down into the element of
the loop around it costs nothing (together they see each part of the request once); loops that do not,
multiply, and at most `MAX_NESTED` of them may.

A macro may call itself on a part of its own argument, once for each part, and so can only do as much as
the argument is large. Macros that call each other in a circle are refused, and so are macros that are
handed on as values: nobody could say what calling them costs.

Branches that exclude each other are walked each from the same variables, and what they leave in those is
merged. What is set in a namespace is told to `template_growth`, which judges all of it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

from jinja2 import nodes

from vllm_lora_ext.template_expressions import Fact, Scope
from vllm_lora_ext.template_macros import MacroWalk
from vllm_lora_ext.template_values import (
    MAX_LITERAL,
    NOTHING,
    ConstructRefused,
    Path,
    Value,
    either,
    joined,
)

MAX_NESTED = 3


class TemplateWalk(MacroWalk):
    """One walk over a template; `run` raises ConstructRefused at the first thing that is refused."""

    _assigned: frozenset[str] = frozenset()

    def run(self) -> None:
        """Walk until nothing new is learned: what a loop sets late may be read early in its next run."""
        for macro in self.tree.find_all(nodes.Macro):
            self._macros.setdefault(macro.name, []).append(macro)
        targets = [node.target for node in self.tree.find_all(nodes.Assign)]
        targets += [node.target for node in self.tree.find_all(nodes.AssignBlock)]
        self._assigned = frozenset(name for target in targets for name in _names(target))
        self._self_calling = frozenset(
            name
            for name, macros in self._macros.items()
            if any(call.node == nodes.Name(name, "load") for macro in macros for call in _calls(macro))
        )
        self._refuse_macros_inside(self.tree.body)
        before: object = None
        while before != (known := (self._fields, dict(self._growth.weights), dict(self._growth.powers))):
            before = known
            self._globals.clear()
            self._found.clear()
            self._body(self.tree.body, Scope(self._globals))
            self._growth.settle()
            self._fields = {name: _field(values) for name, values in self._found.items()}

    def _refuse_macros_inside(self, body: Iterable[nodes.Node], top: bool = True) -> None:
        """A macro that stands in a loop would see the variables of that loop, which the walk does not."""
        for node in body:
            if isinstance(node, nodes.Macro) and not top:
                rule = f"defines the macro `{node.name}` inside of something"
                raise ConstructRefused(node.lineno, rule, "Define it at the start.")
            inside = top and isinstance(node, nodes.If)
            self._refuse_macros_inside(node.iter_child_nodes(), inside)

    # Statements: what they write.

    def _body(self, body: Iterable[nodes.Node], scope: Scope) -> Value:
        return joined([self._statement(node, scope) for node in body])

    def _statement(self, node: nodes.Node, scope: Scope) -> Value:
        self._step(node)
        match node:
            case nodes.Output():
                return self._limited(node, joined(self._all(node.nodes, scope)))
            case nodes.If():
                return self._if(node, scope)
            case nodes.For():
                return self._for(node, scope)
            case nodes.Assign():
                self._assign(node.target, node.node, scope)
            case nodes.AssignBlock():
                text = self._body(node.body, scope.inner())
                made = self._filter(node.filter, text, scope) if node.filter else text
                self._bind(node.target, replace(made, counted=False, literal=False), scope)
            case nodes.FilterBlock():
                return self._filter(node.filter, self._body(node.body, scope.inner()), scope)
            case nodes.With():
                inner = scope.inner()
                for target, value in zip(node.targets, node.values, strict=True):
                    self._bind(target, self._any(value, scope), inner)
                return self._body(node.body, inner)
            case nodes.CallBlock(call=nodes.Call(node=nodes.ExtensionAttribute())):  # {% generation %}
                return self._body(node.body, scope.inner())
            case nodes.Macro() | nodes.Break() | nodes.Continue():  # a macro counts where it is called
                pass
            case _:
                rule = f"uses the tag `{type(node).__name__.lower()}`, which no chat template needs"
                raise ConstructRefused(node.lineno, rule, "Write it without.")
        return NOTHING

    def _if(self, node: nodes.If, scope: Scope) -> Value:
        def walk(test: nodes.Node, body: Sequence[nodes.Node], first: bool) -> Value:
            if not first:  # of the first one it is known that it runs
                self._value(test, scope)
            return self._body(body, replace(scope, facts=(*scope.facts, *self._facts(test, scope))))

        def alone(branch: Callable[[], Value]) -> Value:
            scope.variables.clear()  # in place: macros look at the outermost ones
            scope.variables.update(before)
            text = branch()
            changed = [item for item in scope.variables.items() if before.get(item[0]) is not item[1]]
            after.append(dict(changed))
            return text

        self._value(node.test, scope)
        walks = [partial(walk, node.test, node.body, True)]
        walks += [partial(walk, other.test, other.body, False) for other in node.elif_]
        walks.append(partial(self._body, node.else_, scope))
        before, after = dict(scope.variables), list[dict[str, Value]]()
        text = self._one_of([partial(alone, branch) for branch in walks])
        scope.variables.clear()
        scope.variables.update(before)
        for name in {name for changed in after for name in changed}:
            unchanged = before.get(name, Value((name,)))
            scope.variables[name] = either([changed.get(name, unchanged) for changed in after])
        return text

    def _facts(self, test: nodes.Node, scope: Scope) -> list[Fact]:
        """What `{% if x == 'y' %}` says, if the template does not change `x` anywhere."""
        match test:
            case nodes.Compare(expr=asked, ops=[nodes.Operand(op="eq", expr=nodes.Const(value=answer))]):
                names = [
                    name.name for name in [*asked.find_all(nodes.Name), asked] if isinstance(name, nodes.Name)
                ]
                if not self._assigned.intersection(names) and not any(asked.find_all(nodes.Call)):
                    known = [scope.variables.get(name, Value((name,))).path for name in names]
                    return [Fact(asked, tuple(known), answer)]
        return []

    def _for(self, node: nodes.For, scope: Scope) -> Value:
        if node.recursive:
            rule = "has a recursive loop"
            raise ConstructRefused(node.lineno, rule, "Use a macro that calls itself on a part.")
        over = self._value(node.iter, scope)
        star = self._new_name("*")
        inner = replace(scope.inner(), looping=True, loops=(*scope.loops, star))
        if over.literal:
            inner = replace(inner, repeats=scope.repeats * max(over.items, 1))
            path = (self._new_name("?"),) if over.path is None else over.path
        else:
            path = (*(over.path or (self._new_name("?"),)), star)
            goes_down = scope.element is None or path[: len(scope.element)] == scope.element
            inner = replace(inner, element=path, nested=scope.nested + (not goes_down or not scope.nested))
        if inner.repeats > MAX_LITERAL:
            rule = f"loops over literals more than {MAX_LITERAL:,} times"
            raise ConstructRefused(node.lineno, rule, "Loop over messages or tools.")
        if inner.nested > MAX_NESTED:
            rule = f"nests more than {MAX_NESTED} loops that each go over a whole list"
            raise ConstructRefused(node.lineno, rule, "Loop over a part of what the loop around goes over.")
        controls = joined([Value(holds=scope.controls), over]).holds
        inner = replace(inner, controls=controls)
        element = replace(over, path=path, items=over.inner, literal=over.literal and over.path == ())
        inner.variables["loop"] = replace(over, path=None, counted=False, literal=False)  # .previtem
        self._bind(node.target, element, inner)
        if node.test:
            self._value(node.test, inner)
        text = self._repeated(self._body(node.body, inner), path, star, inner.nested - scope.nested)
        return either([text, self._body(node.else_, scope.inner())])

    def _repeated(self, text: Value, path: Path, star: str, nested: int) -> Value:
        """What a loop writes, whose body writes `text` in each run, and whose variable has this path."""
        holds = {
            name: count if star in self._sites.get(name, ()) else 2 * count
            for name, count in text.holds.items()
        }
        parts = text.path == () or (text.path is not None and text.path[: len(path)] == path)
        return replace(text, holds=holds, power=text.power + (0 if parts and nested < 1 else 1))

    def _assign(self, target: nodes.Node, made: nodes.Node, scope: Scope) -> None:
        if isinstance(target, nodes.Tuple) and isinstance(made, nodes.Tuple):
            values = self._all(made.items, scope)
            if len(values) == len(target.items):  # each to each: `a, b = b, a`
                for item, value in zip(target.items, values, strict=True):
                    self._bind(item, value, scope)
                return
        self._bind(target, self._any(made, scope), scope)

    def _bind(self, target: nodes.Node, value: Value, scope: Scope) -> None:
        if isinstance(target, nodes.Tuple):
            for item in target.items:
                self._bind(item, replace(value, counted=False), scope)
        elif isinstance(target, nodes.Name):
            self._refuse_function_name(target, target.name)
            scope.variables[target.name] = self._limited(target, value)
        elif isinstance(target, nodes.NSRef):  # the one kind of variable that outlives a run of a loop
            self._set_field(target, target.attr, value, scope)


def _names(target: nodes.Node) -> list[str]:
    """The variables that a `set` changes."""
    if isinstance(target, nodes.Tuple):
        return [name for item in target.items for name in _names(item)]
    return [target.name] if isinstance(target, nodes.Name | nodes.NSRef) else []


def _calls(macro: nodes.Macro) -> list[nodes.Call]:
    return list(macro.find_all(nodes.Call))


def _field(values: Sequence[Value]) -> Value:
    """What is certain of a field that is set to these, wherever it is read."""
    found = either(values)
    literal = found.path == ()
    fixed = found.path is not None and not any(part[:1] in "*?" for part in found.path)
    return Value(
        path=found.path if fixed else None,
        size=found.size if literal else 0,
        items=found.items if literal else 0,
        inner=found.inner if literal else 0,
        counted=found.counted,
        literal=literal and found.literal,
    )
