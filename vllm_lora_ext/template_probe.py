"""Render a stranger's chat template where it can do no harm: in a process of its own, under hard limits.

`render_in_child` starts this very file as a program: isolated from the user's settings, with the
template on its standard input and almost no environment. The child limits its own processor time and
memory, renders sample chats and writes one line of JSON. Only the standard library and jinja2 are
imported, so that it starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from jinja2 import ext, nodes, parser, sandbox

CPU_SECONDS = 2  # this is the limit that judges a template
WALL_SECONDS = 30  # and this one a child that hangs: on a busy machine, at a low priority, it waits for long
MEMORY_BYTES = 512 << 20
OUTPUT_FACTOR, OUTPUT_SPARE = 50, 200_000  # characters that may come out, for those that went in
_ERROR_CHARACTERS = 200

# What the child runs first: this file and its packages are found by path, as -I hides the rest.
_START = "import runpy, sys; sys.path += sys.argv[2:]; runpy.run_path(sys.argv[1], run_name='__main__')"


class ProbeUnfinished(Exception):
    """The child gave no verdict, which may be this machine's fault: try again another time."""


class _Generation(ext.Extension):
    """The tag `{% generation %}`, which marks what the model wrote: it renders its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


def template_environment() -> jinja2.Environment:
    """A Jinja environment that renders as transformers' `apply_chat_template` does."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, where Jinja's own filter would escape the characters of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def sample_chats() -> list[tuple[str, dict[str, Any]]]:
    """Ten chats, each with a name: what goes into the template, apart from the special tokens."""
    system = {"role": "system", "content": "You are brief."}
    user = {"role": "user", "content": "What is the weather in Oslo?"}
    answer = {"role": "assistant", "content": "Cold."}
    odd = {"role": "user", "content": "小李 🙂 <|im_end|></s><think>\u202e{{ 7 * 7 }}{% raw %}\x00\n"}
    parts = {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]}
    long = [{"role": turn["role"], "content": turn["content"] * 15} for turn in (user, answer)] * 100
    tools = _sample_tools()
    ask = {"name": "weather", "arguments": {"places": [{"city": "Oslo"}], "unit": "C"}}
    calls = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": ask}],
    }
    result = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"now": -3}'}
    chats: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = [
        ("one question", [user], None, True),
        ("one question without a prompt", [user], None, False),
        ("a system message", [system, user], None, True),
        ("several turns", [user, answer, user, answer, user], None, True),
        ("an answer at the end", [user, answer], None, False),
        ("tools", [user], tools, True),
        ("a tool call", [user, calls, result], tools, True),
        ("content in parts", [parts], None, True),
        ("odd characters", [odd], None, True),
        ("200 messages", long, tools, True),
    ]
    return [
        (name, {"messages": messages, "tools": offered, "documents": None, "add_generation_prompt": prompted})
        for name, messages, offered, prompted in chats
    ]


def _sample_tools() -> list[dict[str, Any]]:
    """One tool, with a list of objects among its parameters."""
    place = {"type": "object", "properties": {"city": {"type": "string"}}}
    schema = {
        "type": "object",
        "properties": {
            "places": {"type": "array", "items": place, "description": "Where."},
            "unit": {"type": "string", "enum": ["C", "F"]},
        },
        "required": ["places"],
    }
    return [
        {"type": "function", "function": {"name": "weather", "description": "Now.", "parameters": schema}}
    ]


def _limit_this_process() -> None:
    """Have the system end this process when it takes too much; Windows has no such limits."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _render(template: jinja2.Template, chat: dict[str, Any], limit: int) -> int:
    """Characters that come out, counted while they come: up to the first piece that passes `limit`."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    total = 0
    for piece in template.generate(**tokens, **chat):
        total += len(piece)
        if total > limit:
            break
    return total


def probe(source: str) -> dict[str, Any]:
    """Render every sample: how many `rendered`, the `errors`, the `largest` output, the `limit` passed."""
    report: dict[str, Any] = {"rendered": 0, "errors": [], "largest": 0, "limit": None}
    name = "compiling"
    try:
        template = template_environment().from_string(source)
        for name, chat in sample_chats():
            limit = OUTPUT_FACTOR * len(json.dumps(chat, ensure_ascii=False)) + OUTPUT_SPARE
            try:
                size = _render(template, chat, limit)
            except MemoryError:
                raise
            except Exception as error:  # a template may refuse a chat, in any way
                report["errors"].append(f"{name}: {type(error).__name__}: {error}"[:_ERROR_CHARACTERS])
                continue
            if size > limit:
                report["limit"] = f"{name}: writes more than {limit} characters"
                break
            report["rendered"] += 1
            report["largest"] = max(report["largest"], size)
    except MemoryError:
        report["limit"] = f"{name}: takes more than {MEMORY_BYTES >> 20} MiB of memory"
    except Exception as error:  # it cannot even be compiled
        report["errors"].append(f"{name}: {type(error).__name__}: {error}"[:_ERROR_CHARACTERS])
    return report


def render_in_child(template: str) -> str | None:
    """What is wrong with the template when sample chats are rendered, in half a sentence; None if nothing.

    Raises:
        ProbeUnfinished: the child could not be started, or had not ended after `WALL_SECONDS`.
    """
    packages = {str(Path(module.__file__).parents[1]) for module in (jinja2, markupsafe) if module.__file__}
    keep = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    command = [sys.executable, "-I", "-c", _START, str(Path(__file__).resolve()), *sorted(packages)]
    try:
        done = subprocess.run(
            command,
            input=template.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WALL_SECONDS,
            env=keep,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeUnfinished(f"has not rendered ten short chats after {WALL_SECONDS} seconds") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ProbeUnfinished(f"could not be tried out: no process could be started ({reason})") from error
    return _verdict(done.returncode, done.stdout)


def _verdict(code: int, output: bytes) -> str | None:
    """What the end of a child means; see `render_in_child`."""
    if code == -getattr(signal, "SIGXCPU", 24):
        return f"takes more than {CPU_SECONDS} seconds of processor time for ten short chats"
    report: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        report = json.loads(output)
    if code or not report:
        raise ProbeUnfinished(f"ended the process that rendered it (code {code})")
    if report["limit"]:
        return str(report["limit"])
    if not report["rendered"]:
        return f"renders no chat at all ({report['errors'][0]})"
    return None


if __name__ == "__main__":
    _limit_this_process()
    print(json.dumps(probe(sys.stdin.buffer.read().decode())))
