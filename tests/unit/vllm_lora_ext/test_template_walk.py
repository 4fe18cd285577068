"""Chat templates that could stop a server are refused by their text alone, before anything renders them."""

from __future__ import annotations

import pytest

from vllm_lora_ext import chat_template
from vllm_lora_ext.chat_template import check_template, judge_template


def names(count: int, line: str, start: str) -> str:
    """`start`, then `line` for each number, with `{i}` and `{j}`, the number before it."""
    return start + "".join(line.replace("{i}", str(i + 1)).replace("{j}", str(i)) for i in range(count))


def nest(*loops: str) -> str:
    """Loops over `loops`, each within the one before."""
    heads = "".join(f"{{% for v{i} in {over} %}}" for i, over in enumerate(loops))
    return heads + "x" + "{% endfor %}" * len(loops)


def in_loop(statement: str, fields: str) -> str:
    return f"{{% set ns = namespace({fields}) %}}{{% for m in messages %}}{{% {statement} %}}{{% endfor %}}"


def macro(body: str, call: str = "f(tools)") -> str:
    return f"{{% macro f(x) %}}{body}{{% endmacro %}}{{{{ {call} }}}}"


REFUSED = {
    "too long": ("x" * 70_000, "70,000 bytes"),
    "no jinja": ("a\n{% for %}", "line 2 is no Jinja"),
    "half a character": ("\ud800", "none in UTF-8"),
    "a long number": ("{{ " + "9" * 5000 + " }}", "thousands of digits"),
    "deep": ("{{ " + "(" * 20_000 + ")" * 20_000 + " }}", "nested too deeply"),
    "four ranges": (nest(*["range(1000)"] * 4), "loops over literals more than 1,000"),
    "two ranges": (nest("range(1000)", "range(2)"), "loops over literals more than 1,000"),
    "a long text, letter by letter": (nest("'" + "x" * 2000 + "'"), "loops over literals"),
    "four loops": (nest(*["messages"] * 4), "nests more than 3 loops"),
    "four, through a macro": (
        macro(nest("messages", "messages"), "0") + nest("messages", "messages").replace("x", "{{ f(1) }}"),
        "nests more than 3 loops",
    ),
    "loops over what grows": (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}"
        + nest("ns.all", "ns.all", "ns.all")
        + "{% set ns.all = ns.all + [m] %}{% endfor %}",
        "nests more than 3 loops",
    ),
    "a recursive loop": ("{% for m in messages recursive %}{{ loop(m) }}{% endfor %}", "recursive loop"),
    "a macro for ever": (macro("{{ f(x) }}"), "not on a part of its argument"),
    "a macro twice": (macro("{{ f(x.a) }}{{ f(x['a']) }}"), "twice on the same part"),
    "a macro once and in a loop": (
        macro("{{ f(x.a) }}{% for v in x.values() %}{{ f(v) }}{% endfor %}"),
        "twice on the same part",
    ),
    "a macro in a loop that repeats": (
        macro("{% for v in x %}{% for w in x %}{{ f(v) }}{% endfor %}{% endfor %}"),
        "not on a part of its argument",
    ),
    "conditions that are both true": (
        macro(
            "{% set t = 1 %}{% if t == 1 %}{{ f(x.a) }}{% endif %}"
            "{% set t = 2 %}{% if t == 2 %}{{ f(x.a) }}{% endif %}"
        ),
        "twice on the same part",
    ),
    "a circle": ("{% macro g(x) %}{{ f(x.a) }}{% endmacro %}" + macro("{{ g(x.a) }}"), "in a circle"),
    "macros doubling": (
        names(
            60, "{% macro m{i}() %}{{ m{j}() }}{{ m{j}() }}{% endmacro %}", "{% macro m0() %}x{% endmacro %}"
        )
        + "{{ m60() }}",
        "repeats the same part|never ends",
    ),
    "macros doubling what they keep": (
        names(
            60,
            "{% macro m{i}() %}{% set r = m{j}() %}{{ r }}{{ r }}{% endmacro %}",
            "{% macro m0() %}{{ messages }}{% endmacro %}",
        )
        + "{{ m60() }}",
        "repeats the same part",
    ),
    "doubling": ("{% set a = 'x' %}" + "{% set a = a ~ a %}" * 60, "repeats the same part"),
    "doubling, other names": (
        names(60, "{% set a{i} = a{j} ~ a{j} %}", "{% set a0 = tools %}"),
        "repeats the same",
    ),
    "adding in turns": (
        "{% set a = tools %}{% set b = a %}" + "{% set a = a + b %}{% set b = b + a %}" * 60,
        "repeats the same part",
    ),
    "doubling in a loop": (in_loop("set ns.a = ns.a ~ ns.a", "a='x'"), "holds it twice"),
    "times two in a loop": (in_loop("set ns.a = ns.a * 2", "a='x'"), "holds it twice"),
    "replacing in a loop": (in_loop("set ns.a = ns.a | replace('x', 'xx')", "a='x'"), "holds it twice"),
    "a count that is none": (
        in_loop("set _ = range(ns.a) %}{% set ns.a = m.content | int", "a=0"),
        "uses `range`",
    ),
    "a power": ("{{ 'a' * 10**9 }}", r"the power `\*\*`"),
    "a product": ("{{ 'a' * 1000000000 }}", "multiplies"),
    "a product of a variable": ("{% set n = 999999999 %}{{ 'a' * n }}", "multiplies"),
    "a range": ("{{ range(10000000) | list }}", "uses `range`"),
    "a range of the request": ("{% for i in range(n) %}{% endfor %}", "uses `range`"),
    "format": ("{{ '%999999999d' | format(1) }}", "filter `format`"),
    "percent": ("{{ '%999999999d' % 1 }}", "uses `%`"),
    "percent star": ("{{ '%*d' % (999999999, 1) }}", "uses `%`"),
    "str.format": ("{{ '{:>999999999}'.format(1) }}", "method `format`"),
    "str.format, nested": ("{{ '{:>{}}'.format(1, n) }}", "method `format`"),
    "format_map": ("{{ '{a}'.format_map(x) }}", "method `format_map`"),
    "center": ("{{ 'a' | center(1000000) }}", "filter `center` with a width"),
    "ljust": ("{{ 'a'.ljust([1000000][0]) }}", "method `ljust` with a width"),
    "zfill": ("{{ 'a'.zfill('1000000' | int) }}", "method `zfill` with a width"),
    "indent": ("{{ messages | tojson(indent=1000000) }}", "filter `tojson` with a width"),
    "batch": ("{{ [1] | batch(100000000, 'x') | list }}", "filter `batch` with a width"),
    "map": ("{{ ['a'] | map('center', 1000000) | list }}", "uses map"),
    "join": ("{{ messages[0].content | join(messages[0].content) }}", "separator that is no constant"),
    "replace": ("{{ x.replace('a', x) }}", "replacement that is no constant"),
    "lipsum": ("{{ lipsum(1000) }}", "calls `lipsum`"),
    "an unknown call": ("{{ ('a' | attr('ljust'))(1000000) }}", "calls an expression"),
    "a function as a value": ("{% set f = range %}{{ f(1000000) }}", "name of a function"),
    "a macro as a value": (
        macro("", "0") + "{% set ns = namespace(get=f) %}{{ ns.get() }}",
        "name of a function or macro",
    ),
    "include": ("{% include 'x' %}", "tag `include`"),
    "import": ("{% import 'x' as y %}", "tag `import`"),
    "extends": ("{% extends 'x' %}", "tag `extends`"),
    "block": ("{% block x %}{{ self.x() }}{% endblock %}", "tag `block`"),
}


@pytest.mark.parametrize(("template", "fragment"), REFUSED.values(), ids=REFUSED.keys())
def test_what_could_stop_a_server_is_refused_unrendered(
    template: str, fragment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "_probe", lambda _: pytest.fail("it was rendered"))
    (finding,) = judge_template(template)
    assert (finding.code, finding.item) == ("template_refused", "chat_template.jinja")
    with pytest.raises(ValueError, match=fragment):
        raise ValueError(str(finding))
    assert finding.fix.endswith(".")


def test_the_line_is_named() -> None:
    assert "line 3 uses" in check_template("a\nb\n{{ 2 ** 3 }}")[0].rule
