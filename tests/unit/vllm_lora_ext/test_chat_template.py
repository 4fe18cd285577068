"""Which chat templates are let in: what models really ship passes, what could stop a server does not.

The templates that pass are written for these tests after the constructs of well-known models.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from vllm_lora_ext import template_probe
from vllm_lora_ext.chat_template import check_template, judge_template, probe_template
from vllm_lora_ext.prompt_text import text_template
from vllm_lora_ext.template_probe import ProbeUnfinished, sample_chats, template_environment

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATING = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set first = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set first = false %}
{% endif %}
{% for message in loop_messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles alternate') }}
{% endif %}
{% if loop.index0 == 0 and first != false %}
{% set content = '<<SYS>>\n' + first + '\n<</SYS>>\n\n' + message['content'] %}
{% else %}{% set content = message['content'] %}{% endif %}
{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}{% endfor %}"""
LAST_QUERY = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}
{%- if ns.multi_step_tool and message.role == "user" and message.content is string
    and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>'))
 %}
{%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}
{%- for message in messages %}
{%- set content = message.content if message.content is string else '' %}{%- set reasoning = '' %}
{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last_query_index %}{{- '<think>' + reasoning.strip('\\n') + '</think>' }}{%- endif %}
{{- content }}
{%- if message.tool_calls %}{%- for tool_call in message.tool_calls %}
{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
{{- tool_call.name }}{%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}
{{- tool_call.arguments | tojson }}{%- endif %}{%- endfor %}{%- endif %}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- 'start' }}{%- endif %}
{%- endfor %}"""
EXTRA_KEYS = """{% macro extra(json_dict, handled) %}{%- if json_dict is mapping %}
{%- for json_key in json_dict if json_key not in handled %}
{{- '<' ~ json_key ~ '>' ~ (json_dict[json_key] | tojson | safe) ~ '</' ~ json_key ~ '>' }}{%- endfor %}
{%- endif %}
{% endmacro %}{%- if not tools is defined %}{%- set tools = [] %}{%- endif %}
{%- for tool in tools or [] %}{%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
{%- for name, fields in tool.parameters.properties|items %}{{- name }}
{%- set handled = ['name', 'type'] %}{{- extra(fields, handled) }}{%- endfor %}
{{- extra(tool.parameters, ['type', 'properties']) }}{%- endfor %}{{- messages[0].content }}"""
TYPESCRIPT = """{%- macro typed(spec, required, nullable=false) -%}
{%- if spec.type == "array" -%}{%- if spec['items'] -%}
{%- set inner = typed(spec['items'], required) -%}{{- 'any[]' if inner|length > 50 else inner + '[]' }}
{%- endif -%}
{%- elif spec.type is iterable and spec.type is not string and spec.type is not mapping -%}
{{- spec.type | join(" | ") }}
{%- elif spec.oneOf -%}{%- for variant in spec.oneOf -%}{{- typed(variant, required) -}}{%- endfor -%}
{%- elif spec.type == "object" and spec.properties -%}
{%- for name, part in spec.properties.items() -%}{{- name -}}
{%- if name not in (spec.required or []) -%}?{%- endif -%}
{{ typed(part, spec.required or []) }}{%- if not loop.last -%}, {%- endif -%}{%- endfor -%}
{%- else -%}{{- spec.type or 'any' }}{%- endif -%}{%- endmacro -%}
{%- macro section(name, tools) -%}{%- for tool in tools %}{%- set tool = tool.function %}
{%- for key, part in tool.parameters.properties.items() %}{{- key }}
{{- typed(part, tool.parameters.required or []) }}
{%- endfor %}{%- endfor %}{%- endmacro -%}
{{- strftime_now("%Y-%m-%d") }}{%- if tools -%}{{- section("functions", tools) }}{%- endif -%}
{%- for message in messages -%}{%- for later in messages[loop.index:] %}{{- later.role }}{%- endfor %}
{%- endfor -%}"""
DECLARED = """{%- macro declare(properties, required) -%}
{%- for key, value in properties | dictsort -%}
{%- if value['type'] | upper == 'ARRAY' -%}
{%- for name, part in value['items'] | dictsort -%}{%- if name == 'properties' -%}
{{- declare(part, value['items']['required'] | default([])) -}}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- if value['type'] | upper == 'OBJECT' -%}
{%- if value['properties'] is mapping -%}{{- declare(value['properties'], []) -}}
{%- else -%}{{- declare(value, []) -}}{%- endif -%}{%- endif -%}
{{ key }}{%- endfor -%}{%- endmacro -%}
{%- for tool in tools or [] -%}{{ declare(tool.function.parameters.properties, []) | trim }}{%- endfor -%}
{{- messages[-1].content -}}"""

PASSING = {
    "chatml, as in examples/tiny_base": CHATML,
    "vllm_lora_ext/prompt_text.py": text_template("classic", "</s>")[0],
    "llama 2, mistral": ALTERNATING,
    "llama 3: a default, a date and arguments": """{% if not date_string is defined %}
{% set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}{% endif %}
{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']|trim %}
{% set messages = messages[1:] %}
{% else %}{% set system = "" %}{% endif %}{{ date_string ~ system }}
{% for message in messages %}{% if not (message.role == 'tool' or 'tool_calls' in message) %}
{{ message.content | trim }}
{% elif 'tool_calls' in message %}{% if message.tool_calls|length != 1 %}{{ raise_exception("one call") }}
{% endif %}
{% for name, value in message.tool_calls[0].function.arguments | items %}
{{ name + '="' ~ value ~ '"' }}{% if not loop.last %}, {% endif %}{% endfor %}{% endif %}{% endfor %}
{% for t in tools or [] %}{{ t | tojson(indent=4) }}{% endfor %}""",
    "mistral nemo": """{%- set user_messages = messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in messages %}
{%- if message.role == "user" or (message.role == "assistant" and not message.tool_calls) %}
{%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("alternate") }}{%- endif %}
{%- set ns.index = ns.index + 1 %}{%- endif %}
{%- if tools is not none and message == user_messages[-1] %}
{%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
{%- for key, val in tool.items() if key != "return" %}
{%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}{{- '"' + key + '": ' + val|tojson }}
{%- endif %}
{%- endfor %}{%- endfor %}{%- endif %}{{- message.content }}{%- endfor %}""",
    "qwen 3": LAST_QUERY,
    "qwen 3 coder": EXTRA_KEYS,
    "gpt-oss": TYPESCRIPT,
    "gemma 4": DECLARED,
    "gemma, with content in parts": """{{ bos_token }}{%- for message in messages -%}
{%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}{{ role }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}
{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<image>' }}
{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endfor -%}""",
    "deepseek: text in a namespace, the last assistant": """{% set ns = namespace(first=true, system='',
 last=-1) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- if ns.first %}{% set ns.system = ns.system + message['content'] %}{% set ns.first = false %}
{%- else %}{% set ns.system = ns.system + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}
{%- endfor %}
{{ ns.system }}{%- set start = 1 if messages[0].role == 'system' else 0 -%}
{%- for message in messages[start:] -%}{%- set index = loop.index0 + start -%}
{%- for i in range(index - 1, -1, -1) -%}{%- if messages[i].role != 'tool' and ns.last == -1 -%}
{%- set ns.last = i -%}{%- endif -%}{%- endfor -%}{{ message['content'] }}{%- endfor -%}""",
    "glm: tools in every system message": """{%- macro visible(content) -%}{%- if content is string -%}
{{- content }}
{%- elif content is iterable and content is not mapping -%}{%- for item in content -%}
{%- if item is mapping and item.type == 'text' -%}{{- item.text }}{%- endif -%}{%- endfor -%}
{%- else -%}{{- content }}{%- endif -%}{%- endmacro -%}
{%- for m in messages -%}{{ visible(m.content) }}{%- for tc in m.tool_calls or [] -%}
{%- for k, v in (tc.function or tc).arguments.items() -%}{{ k ~ v|string }}{%- endfor -%}{%- endfor -%}
{%- for tool in tools or [] -%}{{ tool | tojson(ensure_ascii=False) }}{%- endfor -%}{%- endfor -%}""",
    "a table, a format, an indent by depth": """{%- set steps = {0: 0, 512: 128, 16384: 1024} -%}
{%- macro line(text, depth=2) -%}{{ ' ' * depth }}{{ "%s: " | format(text) }}{{ '-' * 20 }}{%- endmacro -%}
{%- for k, v in steps | dictsort -%}{{ v }}{%- endfor -%}{{ line(messages[0].role) }}
{{ messages[0].content | replace('\\n', '\\\\n') }}
{{ messages | map(attribute='role') | map('upper') | join(', ') }}""",
    "what the model wrote is marked": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
}


REFUSED_BY_PROBE = {
    "renders nothing": ("{{ raise_exception('not today') }}", "renders no chat at all .*not today"),
    "cannot be compiled": ("{{ messages is nosuch }}", "renders no chat at all .*nosuch"),
    "grows with the square": (
        "{% set ns = namespace(a='', b='') %}{% for m in messages %}{% set ns.a = ns.a ~ m.content %}"
        "{% set ns.b = ns.b ~ ns.a %}{% endfor %}{{ ns.b }}",
        "200 messages: writes more than",
    ),
    "takes its time": (
        "{% for a in messages %}{% for b in messages %}{% for c in messages %}{{ a }}{{ b }}{{ c }}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "writes|processor time",
    ),
}


@pytest.mark.parametrize("template", PASSING.values(), ids=PASSING.keys())
def test_what_models_ship_passes(template: str) -> None:
    assert judge_template(template) == []


@pytest.mark.parametrize(("template", "fragment"), REFUSED_BY_PROBE.values(), ids=REFUSED_BY_PROBE.keys())
def test_the_probe_refuses_what_reads_well_and_renders_badly(template: str, fragment: str) -> None:
    assert check_template(template) == []
    (finding,) = judge_template(template)
    with pytest.raises(ValueError, match=fragment):
        raise ValueError(str(finding))
    assert sys.prefix not in str(finding)


def test_a_probe_that_does_not_end_refuses_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }} tried again"
    with monkeypatch.context() as slow:
        slow.setattr(template_probe, "WALL_SECONDS", 0)
        assert "has not rendered" in probe_template(template)[0].rule
    assert probe_template(template) == []


def test_a_child_that_cannot_be_started_is_told_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ProbeUnfinished, match="no process could be started") as caught:
        template_probe.render_in_child("x")
    assert "nowhere" not in str(caught.value)


def test_a_verdict_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }} kept"
    assert judge_template(template) == []
    monkeypatch.setattr(template_probe.subprocess, "run", lambda *_: pytest.fail("it was rendered again"))
    assert judge_template(template) == []


def test_a_chat_that_a_template_rejects_does_not_refuse_it() -> None:
    report = template_probe.probe(ALTERNATING)
    assert (report["rendered"], report["limit"]) == (9, None)
    assert report["largest"] > 0
    assert report["errors"] == ["a tool call: TemplateError: Roles alternate"]


@pytest.mark.parametrize(
    "name", ["chatml, as in examples/tiny_base", "qwen 3", "what the model wrote is marked"]
)
def test_our_environment_renders_as_transformers_does(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    ours = template_environment().from_string(PASSING[name])
    for _, chat in sample_chats():
        if isinstance(chat["messages"][0]["content"], str):
            arguments: dict[str, Any] = {key: value for key, value in chat.items() if key != "messages"}
            (theirs,), _ = render_jinja_template([chat["messages"]], chat_template=PASSING[name], **arguments)
            assert ours.render(**chat) == theirs
