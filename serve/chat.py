"""`vllm-lora chat`: ask a running server, streaming; or `--local`, base and adapter side by side."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serve.client import make_client, server_url
from serve.flags import at_least
from vllm_lora_ext.errors import ServerFailed, ServerUnreachable
from vllm_lora_ext.spec import folder_name

if TYPE_CHECKING:
    import openai


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
    parser.add_argument("--url", default=server_url())
    parser.add_argument("--base-model", help="with --local: its base (default: the one it names)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=at_least(1), default=256)
    args = parser.parse_args(argv)
    if args.local:
        ask = local_asker(args.local, args.base_model, args.max_tokens)
    else:
        ask = server_asker(args.url, args.model, args.temperature, args.max_tokens)
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


def server_asker(url: str, model: str, temperature: float, max_tokens: int) -> Callable[[str], None]:
    """A function that asks the server and prints the answer as it comes.

    Raises, when called:
        ServerUnreachable: nobody answers at `url`.
        ServerFailed: the server answers with an error, for example an unknown model.
    """
    import httpx
    import openai

    client = make_client(url)

    def ask(question: str) -> None:
        try:
            stream = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=temperature,
                max_tokens=max_tokens,
                stream=True,
            )
            answered = False
            for chunk in stream:
                if chunk.choices:
                    answered = True
                    print(chunk.choices[0].delta.content or "", end="", flush=True)
            print()
            if not answered:
                raise ServerFailed(url, "the answer was empty", "Is it an OpenAI-compatible server?")
        except openai.APIConnectionError as error:
            raise ServerUnreachable(
                url, "no server answers", "Start one with `vllm-lora serve`, or give --url."
            ) from error
        except openai.APIStatusError as error:
            what = str(error.message).rstrip(".")
            raise ServerFailed(f"{url} (HTTP {error.status_code})", what, _names(client)) from error
        except (openai.OpenAIError, httpx.HTTPError, ValueError) as error:
            what = f"the answer cannot be read ({type(error).__name__}: {error})"
            raise ServerFailed(url, what, "Is it an OpenAI-compatible server?") from error

    return ask


def _names(client: openai.OpenAI) -> str:
    """The names that the server does serve, as a hint."""
    import openai

    try:
        return f"It serves: {', '.join(model.id for model in client.models.list())}."
    except openai.OpenAIError:
        return ""


def local_asker(adapter_dir: Path, base_model: str | None, max_tokens: int) -> Callable[[str], None]:
    """A function that prints what the base and what the adapter says, with transformers and PEFT."""
    from rich.table import Table

    from serve.screen import screen
    from train.answers import LocalChat

    chat = LocalChat(adapter_dir, base_model)
    name = folder_name(adapter_dir)

    def ask(question: str) -> None:
        answers = chat.ask(question, max_tokens)
        table = Table("base", name, title=question, min_width=60)
        table.add_row(answers.base, answers.adapter)
        screen(stderr=False).print(table)

    return ask
