"""Walk the calls of a chat template's macros; see `template_walk`."""

from __future__ import annotations

from dataclasses import replace

from jinja2 import nodes

from vllm_lora_ext.template_expressions import ExpressionWalk, Fact, Scope
from vllm_lora_ext.template_growth import SHORTEN
from vllm_lora_ext.template_values import ConstructRefused, Path, Value, either, joined


class MacroWalk(ExpressionWalk):
    """The part of a walk that calls macros: each call is walked with its arguments."""

    def _macro_call(self, node: nodes.Call, name: str, scope: Scope) -> Value:
        """Walk the macro with the arguments of this call, unless it is calling itself."""
        by_place = [self._any(argument, scope) for argument in node.args]
        by_name = {item.key: self._any(item.value, scope) for item in node.kwargs}
        if node.dyn_args or node.dyn_kwargs:
            rule = f"calls the macro `{name}` with a list of arguments"
            raise ConstructRefused(node.lineno, rule, "Write each argument.")
        given = joined([replace(value, namespace=False) for value in [*by_place, *by_name.values()]])
        made = []
        for macro in self._macros[name]:
            names = [argument.name for argument in macro.args]
            arguments = dict(zip(names, by_place, strict=False)) | by_name
            unnamed = len(by_place) > len(names) or not by_name.keys() <= set(names)
            if unnamed and (
                name in self._self_calling or any(value.namespace for value in [*by_place, *by_name.values()])
            ):
                rule = f"gives the macro `{name}` more than it has parameters for"
                raise ConstructRefused(node.lineno, rule, "Write each argument.")
            if name in scope.macros:
                made.append(self._self_call(node, name, arguments, scope))
            else:
                made.append(self._macro_text(macro, arguments, given, scope))
        return replace(either(made), path=None, counted=False, literal=False, namespace=False)

    def _macro_text(
        self, macro: nodes.Macro, arguments: dict[str, Value], given: Value, scope: Scope
    ) -> Value:
        variables = dict(self._globals) | {"varargs": given, "kwargs": given}
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
            if macro.name in self._self_calling and not value.namespace:
                kept = self._parameter(macro.name, item.name)
                self._keep(macro, kept, value, scope, nested=0)
                variables[item.name] = replace(value, path=path, copies=0, power=0, holds={kept: 1})
        paths = {item.name: variables[item.name].path or () for item in macro.args}
        before, self._self_calls = self._self_calls, []
        text = self._body(macro.body, replace(inside, parameters=paths))
        self._self_calls = before
        return self._own_text(macro, self._limited(macro, text))

    @staticmethod
    def _parameter(macro: str, name: str) -> str:
        return f"{macro}({name})"

    def _own_text(self, macro: nodes.Macro, text: Value) -> Value:
        """The text of a macro, without what stands in it for the texts of its calls of itself."""
        own = {name: count for name, count in text.holds.items() if name.startswith(f"{macro.name}@")}
        if any(count > 1 for count in own.values()):
            rule = f"lets the macro `{macro.name}` write twice what it gets from itself"
            raise ConstructRefused(macro.lineno, rule, SHORTEN)
        if macro.name not in self._self_calling:
            return text
        holds = {name: count for name, count in text.holds.items() if name not in own}
        return replace(text, holds=holds, power=text.power + 1)

    def _self_call(self, node: nodes.Call, name: str, arguments: dict[str, Value], scope: Scope) -> Value:
        """A value that stands for what the macro writes when it is called by itself, here."""
        self._judge_self_call(node, name, arguments, scope)
        for key, value in arguments.items():
            if value.namespace:
                self._refuse_namespace(node)
            collects = value.copies > 0 or len(value.holds) > 1  # or is it but a part of what was given
            self._keep(node, self._parameter(name, key), value, scope, nested=int(collects))
        site = f"{name}@{id(node)}"
        self._sites[site] = scope.loops
        return Value(copies=0, holds={site: 1})

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
