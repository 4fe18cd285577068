"""A prompt form that is a text with slots, such as the classic one, becomes a Jinja chat template."""

from __future__ import annotations

import json
import re

from vllm_lora_ext.errors import BadSetting

CLASSIC = "Human: {instruction}\n{input}\n\nAssistant: "

_TEXT_FORM = re.compile(
    r"(?P<before>.*)\{instruction\}(?:(?P<between>\s*)\{input\})?(?P<after>.*)", re.DOTALL
)
_SLOT = re.compile(r"\{(instruction|input)\}")


def text_template(text: str, end: str, begin: str = "") -> tuple[str, str]:
    r"""The chat template of a text form or of `classic`, and what joins instruction and input in a message.

    `end` is the base's end-of-text token, `begin` the token that it puts in front of every text, if any.
    In a text, `\n` may be written as two characters, as shells pass it on.

    Raises:
        BadSetting: the text has no `{instruction}`, or parts that a chat message cannot fill.
    """
    match = _TEXT_FORM.fullmatch(CLASSIC if text == "classic" else text.replace("\\n", "\n"))
    if not match or _SLOT.search(match["before"] + match["after"]):
        raise BadSetting(
            f"--prompt-template {text!r}",
            "must hold {instruction} once, and {input} only directly behind it, because a chat "
            "message is one text",
            r"For example 'Human: {instruction}\n{input}\n\nAssistant: '.",
        )
    template = _template(match["before"], match["after"], begin, end)
    return template, match["between"] if match["between"] is not None else "\n"


def _template(before: str, after: str, begin: str, end: str) -> str:
    """A chat template that writes the text form, turn after turn.

    Space around question and lead-in is stripped, as the classic script does
    before it appends the answer's lead-in. A system message stands in front of
    the question that follows it. String literals are JSON, which Jinja reads.
    """
    lead, tail, start, stop = (json.dumps(part, ensure_ascii=False) for part in (before, after, begin, end))
    return (
        "{% set turn = namespace(system='') %}"
        "{{ " + start + " }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set turn.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ (turn.system + " + lead + " + message['content']).strip() + " + tail + " }}"
        "{% set turn.system = '' %}"
        "{% else %}"
        "{{ message['content'] + " + stop + " }}"
        "{% endif %}"
        "{% endfor %}"
    )
