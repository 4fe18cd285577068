"""`vllm-lora chat`: ask a running server, streaming; or `--local`, base and adapter side by side."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2

from serve.client import make_client, require_url, server_url, without_password
from serve.flags import at_least
from vllm_lora_ext.errors import ServerFailed, ServerUnreachable
from vllm_lora_ext.spec import folder_name, printable

if TYPE_CHECKING:
    import openai

_LOCAL_TOKENS = 256
_NAMES = 20  # shown to whom asked for one that is not served
_IS_IT = "Is it an OpenAI-compatible server?"


def main(argv: Sequence[str]) -> int:
    """Answer one question, or keep asking until the input ends."""
    parser = argparse.ArgumentParser(
        prog="vllm-lora chat",
        description="Ask an adapter. Without a question it keeps asking until Ctrl+D.",
        allow_abbrev=False,
    )
    whom = parser.add_mutually_exclusive_group(required=True)
    whom.add_argument("-m", "--model", help="name of an adapter, or of the base, on a running server")
    whom.add_argument("--local", type=Path, metavar="DIR", help="an adapter's folder; needs no server")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--url", default=server_url(), help="the server (default: %(default)s)")
    parser.add_argument("--base-model", help="with --local: its base (default: the one it names)")
    parser.add_argument("--temperature", type=float, help="default: as the adapter, or the server, has it")
    parser.add_argument("--max-tokens", type=at_least(1), help="default: the server's; 256 with --local")
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON")
    args = parser.parse_args(argv)
    if args.local:
        ask = local_asker(args.local, args.base_model, args.max_tokens or _LOCAL_TOKENS, args.json)
    else:
        ask = server_asker(args.url, args.model, args.temperature, args.max_tokens, args.json)
    for question in [args.question] if args.question else questions():
        ask(question.encode("utf-8", "replace").decode())  # a terminal may pass on half a character
    return 0


def questions() -> Iterator[str]:
    """Questions typed by a person, or piped in, one a line."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


def server_asker(
    url: str, model: str, temperature: float | None, max_tokens: int | None, as_json: bool = False
) -> Callable[[str], None]:
    """A function that asks the server and prints the answer as it comes.

    What is None is left to the server, which asks as the adapter's chat settings say.

    Raises, when called:
        ServerUnreachable: nobody answers at `url`.
        ServerFailed: the server answers with an error, for example an unknown model.
    """
    require_url(url)
    client, shown_url = make_client(url), without_password(url)
    stated = {"temperature": temperature, "max_tokens": max_tokens}
    settings: Any = {name: value for name, value in stated.items() if value is not None}

    def ask(question: str) -> None:
        with _told(shown_url, client):
            stream = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}], stream=True, **settings
            )
            answer, answered_by = [], None
            for chunk in stream:
                answered_by = chunk.model
                for choice in chunk.choices[:1]:
                    answer.append(choice.delta.content or "")
                    print("" if as_json else answer[-1], end="", flush=True)
            if not answer:
                raise ServerFailed(shown_url, "the answer was empty", _IS_IT)
            _print_json({"model": answered_by, "answer": "".join(answer)}) if as_json else print()

    return ask


@contextmanager
def _told(url: str, client: openai.OpenAI) -> Iterator[None]:
    """Errors of the official client as ours."""
    import openai

    try:
        yield
    except openai.APITimeoutError as error:
        raise ServerUnreachable(url, "gives no answer in time", "Is it busy, or still starting?") from error
    except openai.APIConnectionError as error:
        if isinstance(error.__cause__, httpx2.ConnectError):
            fix = "Start one with `vllm-lora serve`, or give --url."
            raise ServerUnreachable(url, "no server answers", fix) from error
        rule = f"the connection broke ({type(error.__cause__ or error).__name__})"
        raise ServerFailed(url, rule, "Is it still running?") from error
    except openai.APIStatusError as error:
        words = error.body.get("message") if isinstance(error.body, dict) else None
        what = printable(str(words or error.message)).rstrip(".")
        raise ServerFailed(f"{url} (HTTP {error.status_code})", what, _fix(error, client)) from error
    except (openai.OpenAIError, httpx2.HTTPError, ValueError) as error:
        what = f"the answer cannot be read ({type(error).__name__}: {error})"
        raise ServerFailed(url, what, _IS_IT) from error


def _fix(error: openai.APIStatusError, client: openai.OpenAI) -> str:
    """What helps against an error: the key, or the names that the server does serve."""
    import openai

    if error.status_code in (401, 403):
        return "The key is OPENAI_API_KEY."
    if error.status_code != 404:
        return ""
    try:
        names = [printable(model.id) for model in client.models.list()]
    except (
        openai.OpenAIError,
        ValueError,
        TypeError,
        AttributeError,
    ):  # whatever it answers, it is a hint only
        return ""
    more = ", ..." if len(names) > _NAMES else ""
    return f"It serves: {', '.join(names[:_NAMES])}{more}."


def local_asker(
    adapter_dir: Path, base_model: str | None, max_tokens: int, as_json: bool = False
) -> Callable[[str], None]:
    """A function that prints what the base and what the adapter says, with transformers and PEFT."""
    from rich.table import Table

    from serve.screen import screen
    from train.answers import LocalChat

    chat = LocalChat(adapter_dir, base_model)
    name = folder_name(adapter_dir)

    def ask(question: str) -> None:
        answers = chat.ask(question, max_tokens)
        if as_json:
            _print_json({"base": answers.base, "adapter": answers.adapter})
            return
        table = Table("base", name, title=question, min_width=60)
        table.add_row(answers.base, answers.adapter)
        screen(stderr=False).print(table)

    return ask


def _print_json(body: Mapping[str, Any]) -> None:
    print(json.dumps(body, ensure_ascii=False), flush=True)
