"""Judge a stranger's chat template before a server renders it.

A chat template is a program that an adapter brings along: a loop without end, or a text that doubles
itself, would stop the server for everybody. `judge_template` therefore reads the program without
running it, and refuses what could take more time or memory than the request is large (the rules are in
`template_walk`). What passes is rendered with sample chats in a process of its own. The first step sees
branches that no sample enters, but it bounds how work grows, not how much it is: a template may still
go over the messages three times, each within the other. The second step measures.
"""

from __future__ import annotations

from functools import lru_cache

from jinja2 import TemplateSyntaxError

from vllm_lora_ext.contract import TEMPLATE_FILE
from vllm_lora_ext.spec import Finding
from vllm_lora_ext.template_probe import ProbeUnfinished, render_in_child, template_environment
from vllm_lora_ext.template_values import ConstructRefused
from vllm_lora_ext.template_walk import TemplateWalk

CODE = "template_refused"
MAX_TEMPLATE_BYTES = 64 << 10
_VERDICTS_KEPT = 1024


def judge_template(template: str) -> list[Finding]:
    """Why a server must not render this template; empty if it may.

    The verdict on a text is kept, because many adapters share one template.
    """
    return check_template(template) or probe_template(template)


def check_template(template: str) -> list[Finding]:
    """The first half of `judge_template`: what can be said without rendering."""
    return list(_check(template))


def probe_template(template: str) -> list[Finding]:
    """The second half of `judge_template`: what happens when it renders sample chats.

    A probe that did not end may be this machine's fault: it refuses, and is tried anew next time.
    """
    try:
        problem = _probe(template)
    except ProbeUnfinished as error:
        problem = str(error)
    return [_finding(problem, "Simplify the template, or try again.")] if problem else []


def _finding(rule: str, fix: str) -> Finding:
    return Finding(CODE, TEMPLATE_FILE, rule, fix)


_probe = lru_cache(_VERDICTS_KEPT)(render_in_child)


@lru_cache(_VERDICTS_KEPT)
def _check(template: str) -> tuple[Finding, ...]:
    size = len(template.encode(errors="replace"))
    if size > MAX_TEMPLATE_BYTES:
        rule = f"has {size:,} bytes, at most {MAX_TEMPLATE_BYTES:,} are read"
        return (_finding(rule, "Shorten it."),)
    try:
        template.encode()  # half a surrogate pair cannot be sent to a model either
        TemplateWalk(template_environment().parse(template)).run()
    except ConstructRefused as error:
        return (_finding(f"line {error.line} {error.rule}", error.fix),)
    except TemplateSyntaxError as error:
        return (_finding(f"line {error.lineno} is no Jinja ({error.message})", "Repair it."),)
    except UnicodeEncodeError:
        return (_finding("holds characters that are none in UTF-8", "Repair it."),)
    except RecursionError:
        return (_finding("is nested too deeply", "Simplify it."),)
    except ValueError:
        return (_finding("holds a number of thousands of digits", "Shorten the number."),)
    return ()
