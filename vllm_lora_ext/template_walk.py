"""Walk a parsed chat template and refuse what could take a server's time or memory.

The walk follows the template as rendering would, macro calls included: every call is walked with the
arguments that it has. What is bounded by the request passes. A loop that walks down into the element of
the loop around it costs nothing (together they see each part of the request once); loops that do not,
multiply, and at most `MAX_NESTED` of them may.

A macro may call itself on a part of its own argument, once for each part, and so can only do as much as
the argument is large. Macros that call each other in a circle are refused, and so are macros that are
handed on as values: nobody could say what calling them costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

from jinja2 import nodes

from vllm_lora_ext.template_expressions import SHORTEN, ExpressionWalk, Fact, Scope
from vllm_lora_ext.template_values import (
    MAX_LITERAL,
    NOTHING,
    ConstructRefused,
    Value,
    either,
    joined,
)

MAX_NESTED = 3


class TemplateWalk(ExpressionWalk):
    """One walk over a template; `run` raises ConstructRefused at the first thing that is refused."""

    _assigned: frozenset[str] = frozenset()

    def run(self) -> None:
        """Walk until nothing new is learned: what a loop sets late may be read early in its next run."""
        for macro in self.tree.find_all(nodes.Macro):
            self._macros.setdefault(macro.name, []).append(macro)
        targets = [node.target for node in self.tree.find_all(nodes.Assign)]
        targets += [node.target for node in self.tree.find_all(nodes.AssignBlock)]
        self._assigned = frozenset(name for target in targets for name in _names(target))
        known = -1
        while len(self._uncounted) + len(self._grown) > known:
            known = len(self._uncounted) + len(self._grown)
            self._globals.clear()
            self._body(self.tree.body, Scope(self._globals))

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
                self._assign(node, scope)
            case nodes.AssignBlock():
                text = self._body(node.body, scope.inner())
                made = self._filter(node.filter, text, scope) if node.filter else text
                self._bind(node.target, replace(made, counted=False), scope)
            case nodes.FilterBlock():
                return self._filter(node.filter, self._body(node.body, scope.inner()), scope)
            case nodes.With():
                inner = scope.inner()
                for target, value in zip(node.targets, node.values, strict=True):
                    self._bind(target, self._value(value, scope), inner)
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

        self._value(node.test, scope)
        walks = [partial(walk, node.test, node.body, True)]
        walks += [partial(walk, other.test, other.body, False) for other in node.elif_]
        return self._one_of([*walks, partial(self._body, node.else_, scope)])

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
        element = replace(over, path=path, items=over.inner, literal=over.literal and over.path == ())
        inner.variables["loop"] = Value()
        self._bind(node.target, element, inner)
        if node.test:
            self._value(node.test, inner)
        return either([self._body(node.body, inner), self._body(node.else_, scope.inner())])

    def _assign(self, node: nodes.Assign, scope: Scope) -> None:
        if not isinstance(node.target, nodes.NSRef):
            self._bind(node.target, self._value(node.node, scope), scope)
            return
        self._set_field(node, node.target, scope)

    def _set_field(self, node: nodes.Assign, target: nodes.NSRef, scope: Scope) -> None:
        """Set a field of a namespace, the one kind of variable that outlives a run of a loop."""
        name = target.attr
        fields = scope.variables.get(target.name, Value()).fields
        fields = {} if fields is None else fields
        fields[name] = replace(fields.get(name, NOTHING), again=1)
        made = self._limited(node, self._value(node.node, scope))  # its own old value counts in `again`
        if made.again > 1 and scope.looping:
            rule = f"sets `{target.name}.{name}` to what holds it twice, in a loop"
            raise ConstructRefused(node.lineno, rule, SHORTEN)
        if not made.counted:
            self._uncounted.add(name)
        if scope.looping:
            self._grown.add(name)
        fields[name] = replace(made, again=0)

    def _bind(self, target: nodes.Node, value: Value, scope: Scope) -> None:
        if isinstance(target, nodes.Tuple):
            for item in target.items:
                self._bind(item, replace(value, counted=False), scope)
        elif isinstance(target, nodes.Name):
            self._refuse_function_name(target, target.name)
            scope.variables[target.name] = self._limited(target, value)


def _names(target: nodes.Node) -> list[str]:
    """The variables that a `set` changes."""
    if isinstance(target, nodes.Tuple):
        return [name for item in target.items for name in _names(item)]
    return [target.name] if isinstance(target, nodes.Name | nodes.NSRef) else []
