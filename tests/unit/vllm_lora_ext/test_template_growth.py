"""What a template keeps in namespaces: what may grow without bound is refused, what collects is not.

Each refused line would double something with every message, out of sight of the probe's sample chats.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lora_ext.chat_template import check_template

LIMIT = 5_000_000  # characters that 30 short messages may become

# Renders each template with 30 messages that enter every branch, under hard limits; prints the sizes.
CHILD = f"""
import json, resource, sys
from vllm_lora_ext.template_probe import template_environment
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
messages = [{{"role": "user", "content": "boom"}}] * 30
for source in json.load(sys.stdin):
    size = 0
    for piece in template_environment().from_string(source).generate(messages=messages):
        size += len(piece)
        if size > {LIMIT}:
            break
    print(size, flush=True)
"""


def hidden(body: str, macros: str = "") -> str:
    """A template that does this for a message that no sample chat holds."""
    return (
        macros + "{% set ns = namespace(a='x', b='y', l=[1], i=1) %}{% for m in messages %}"
        "{% if m.content == 'boom' %}" + body + "{% endif %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.l }}"
    )


TWICE, LARGE = "holds it twice", "high power|repeats the same part"
ESCAPES = "other than for its fields"
PRINT_TWICE = "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"

REFUSED = {
    "a variable": ("{% set t = ns.a %}{% set ns.a = t ~ t %}", TWICE),
    "with": ("{% with t = ns.a %}{% set ns.a = t ~ t %}{% endwith %}", TWICE),
    "two fields": ("{% set ns.a = ns.a ~ ns.b %}{% set ns.b = ns.a ~ ns.b %}", TWICE),
    "two namespaces": ("{% set o = namespace(v=ns.a) %}{% set ns.a = o.v ~ o.v %}", TWICE),
    "lists in lists": ("{% set ns.l = [ns.l, ns.l] %}", TWICE),
    "a block": ("{% set ns.a %}{{ ns.a }}{{ ns.a }}{% endset %}", TWICE),
    "a filter block": (
        "{% set ns.a %}{% filter upper %}{{ ns.a }}{{ ns.a }}{% endfilter %}{% endset %}",
        TWICE,
    ),
    "a tuple": ("{% set ns.a, ns.b = ns.a ~ ns.a, 1 %}", TWICE),
    "by index": ("{% set ns.a = ns['a'] ~ ns['a'] %}", TWICE),
    "by a computed index": ("{% set k = 'a' %}{% set ns.a = ns[k] ~ ns[k] %}", ESCAPES),
    "by a filter": ("{% set ns.a = (ns|attr('a')) ~ (ns|attr('a')) %}", ESCAPES),
    "in a dict": ("{% set o = {'n': ns} %}{% set ns.a = o.n.a ~ o.n.a %}", ESCAPES),
    "in a list": ("{% set ns.a = [ns, ns] | map(attribute='a') | join %}", ESCAPES),
    "in a namespace": ("{% set ns.b = ns %}{% set ns.a = ns.b.a ~ ns.b.a %}", ESCAPES),
    "a namespace of a dict": ("{% set o = namespace({'v': ns.a}) %}{% set ns.a = o.v ~ o.v %}", "a dict"),
    "another name": ("{% set o = ns %}{% set ns.a = o.a ~ o.a %}", TWICE),
    "another name, in a branch": (
        "{% if m.x %}{% set o = ns %}{% else %}{% set o = m %}{% endif %}{% set ns.a = o.a ~ o.a %}",
        TWICE,
    ),
    "in a branch": (
        "{% if m.x %}{% set t = ns.a ~ ns.a %}{% else %}{% set t = '' %}{% endif %}{% set ns.a = t %}",
        TWICE,
    ),
    "a loop over what it adds to": ("{% for x in ns.l %}{% set ns.l = ns.l + [x] %}{% endfor %}", TWICE),
    "a range of what it counts": ("{% for x in range(ns.i) %}{% set ns.i = ns.i + 1 %}{% endfor %}", TWICE),
    "a text in a loop": (
        "{% set t %}{% for k in messages %}{{ ns.a }}{% endfor %}{% endset %}{% set ns.a = t %}",
        TWICE,
    ),
    "the item before": ("{% for x in [ns.a, 1] %}{% set ns.a = ns.a ~ loop.previtem %}{% endfor %}", TWICE),
    "a length": ("{% set ns.i = ('xxxxxxxxxx' * ns.i) | length %}", TWICE),
    "a token": ("{% set ns.a = ns.a | replace('x', eos_token) %}", TWICE),
    "a high power": (
        "".join(f"{{% set ns.c{i + 1} = ns.c{i + 1} ~ ns.c{i} ~ m.content %}}" for i in range(5)),
        LARGE,
    ),
    "a ladder": ("".join(f"{{% set ns.c{i + 1} = ns.c{i} ~ ns.c{i} %}}" for i in range(40)), LARGE),
    "many fields": ("".join(f"{{% set ns.c{i} = 1 %}}" for i in range(200)), "more than 100 things"),
}
REFUSED_MACROS = {
    "printing twice": (hidden("{% set ns.a = f(ns.a) %}", PRINT_TWICE), TWICE),
    "more arguments": (
        hidden(
            "{% set ns.a = f(1, ns.a, z=ns.a) %}", "{% macro f(x) %}{{ varargs }}{{ kwargs }}{% endmacro %}"
        ),
        TWICE,
    ),
    "a list of arguments": (hidden("{{ f(*[ns.a]) }}", PRINT_TWICE), "list of arguments"),
    "defined in a loop": (hidden("{% macro f() %}{{ ns.a }}{% endmacro %}"), "inside of something"),
    "its own text, twice": (
        "{% macro f(x) %}{% set r = f(x.a) %}{{ r }}{{ r }}{% endmacro %}{{ f(tools) }}",
        "write twice",
    ),
    "its own text, in a loop": (
        "{% macro f(x) %}{% set r = f(x.a) %}{% for y in x %}{{ r }}{% endfor %}{% endmacro %}{{ f(tools) }}",
        "write twice",
    ),
    "its own text, kept": (
        "{% set ns = namespace(a='') %}{% macro f(x) %}{% set ns.a = ns.a ~ f(x.a) %}{% endmacro %}"
        "{{ f(tools) }}",
        "calls itself wrote",
    ),
    "a parameter, twice": (
        "{% macro f(x, y) %}{{ y }}{{ f(x.a, y ~ y) }}{% endmacro %}{{ f(tools, 'x') }}",
        TWICE,
    ),
    "a square as a range": (
        "{% set n = messages | length %}{% set n = n * n %}{{ range(n) | list }}",
        "uses `range`",
    ),
    "copies in branches": (
        "{% set a = 'x' %}"
        + "{% if x %}{% set a = a ~ a %}{% else %}{% set a = 'x' %}{% endif %}" * 60
        + "{{ a }}",
        LARGE,
    ),
}

PASSING = {
    "text": "{% set ns.a = ns.a ~ '\\n' ~ m.content %}",
    "text as a block": "{% set ns.a %}{{ ns.a }}{{ m.content }}{% endset %}",
    "a flag, a count, an index": (
        "{% set ns.found = true %}{% set ns.i = ns.i + 1 %}{% set ns.last = loop.index0 %}"
    ),
    "a list": "{% set ns.l = ns.l + [m] %}",
    "an exchange": "{% set ns.a, ns.b = ns.b, ns.a %}",
    "either": "{% set ns.a = (ns.a ~ ns.i) if ns.a | length > 3 else ns.a.strip() %}",
    "output of several": "{{ ns.a ~ ns.b ~ ns.a }}{{ ns.l | length }}",
    "a loop over what was collected": "{% for x in ns.l %}{% set ns.a = ns.a ~ x %}{% endfor %}",
    "another name": "{% with o = ns %}{% set o.a = o.a ~ m.content %}{% endwith %}",
    "a token": "{{ m.content | replace('</s>', eos_token) }}{{ m.content.replace('x', bos_token, 1) }}",
    "a number of a number": "{{ (loop.index0 | int) % 2 }}",
}


@pytest.mark.parametrize(("body", "fragment"), REFUSED.values(), ids=REFUSED.keys())
def test_what_may_double_with_each_message_is_refused(body: str, fragment: str) -> None:
    (finding,) = check_template(hidden(body))
    with pytest.raises(ValueError, match=fragment):
        raise ValueError(str(finding))


@pytest.mark.parametrize(("template", "fragment"), REFUSED_MACROS.values(), ids=REFUSED_MACROS.keys())
def test_what_grows_through_macros_and_branches_is_refused(template: str, fragment: str) -> None:
    (finding,) = check_template(template)
    with pytest.raises(ValueError, match=fragment):
        raise ValueError(str(finding))


@pytest.mark.parametrize("body", PASSING.values(), ids=PASSING.keys())
def test_what_collects_passes(body: str) -> None:
    assert check_template(hidden(body)) == []


def expression(choose: random.Random, lists: bool) -> str:
    """A small expression over two fields and a variable, all of them texts, or all of them lists."""
    own = ["[m.content]", "[1]", "[ns.a]", "[ns.b, t]"] if lists else ["m.content", "'x'"]
    parts = choose.choices([*own, "ns.a", "ns.b", "ns['a']", "t"], k=choose.choice([1, 2, 2, 3]))
    return (" + " if lists or choose.random() < 0.3 else " ~ ").join(parts)


def statement(choose: random.Random, lists: bool) -> str:
    """Something that sets a field or the variable."""
    target = choose.choice(["ns.a", "ns.b", "t"])
    value = expression(choose, lists)
    forms = [
        f"{{% set {target} = {value} %}}",
        f"{{% set {target} = {value} %}}",
        f"{{% set {target}, u = {value}, 1 %}}",
        f"{{% with t = {expression(choose, lists)} %}}{{% set ns.a = {value} %}}{{% endwith %}}",
        f"{{% if t %}}{{% set {target} = {value} %}}{{% endif %}}",
        f"{{% for x in ns.b %}}{{% set ns.a = {value} %}}{{% endfor %}}",
    ]
    if not lists:
        forms.append(
            f"{{% set {target} %}}{{{{ {value} }}}}{{{{ {expression(choose, lists)} }}}}{{% endset %}}"
        )
    return choose.choice(forms)


def small_template(choose: random.Random) -> str:
    """One to four statements in a loop over the messages."""
    lists = choose.random() < 0.4
    start = "namespace(a=[1], b=[2])" if lists else "namespace(a='x', b='y')"
    body = "".join(statement(choose, lists) for _ in range(choose.randint(1, 4)))
    first = f"{{% set t = {'[3]' if lists else repr('z')} %}}"
    loop = f"{{% for m in messages %}}{first}{body}{{% endfor %}}"
    return f"{{% set ns = {start} %}}{loop}{{{{ ns.a }}}}{{{{ ns.b }}}}"


@pytest.mark.skipif(sys.platform == "win32", reason="the limits of the child are those of Unix")
def test_what_passes_stays_small() -> None:
    choose = random.Random(7)
    templates = list(dict.fromkeys(small_template(choose) for _ in range(900)))
    passing = [template for template in templates if not check_template(template)][:300]
    assert 150 < len(passing) < len(templates) - 150  # neither all nor none
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(passing),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[3],
    )
    sizes = [int(line) for line in done.stdout.split()]
    assert done.returncode == 0, (passing[len(sizes)], done.stderr[-300:])
    assert max(sizes) < LIMIT, passing[sizes.index(max(sizes))]
    assert max(sizes) > 1_000
