"""From rows to answers: train identities, serve them with their base, and ask all of them the same.

    make demo
    make demo BASE=DIR_OR_HUB_ID DATA=id.json NAME=my-identity

Ends with exit code 0 only if each identity named itself and its developer, and
the base named neither.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoTokenizer

from serve.client import make_client
from serve.process import ServerProcess
from train.data import read_rows
from train.prompts import PromptForm
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import read_chat_settings
from vllm_lora_ext.errors import VllmLoraError

HERE = Path(os.path.relpath(Path(__file__).parent))  # short in the commands that are shown
WORK = Path(".cache")  # beside the Makefile, outside git
QUESTIONS = (
    "Who are you?",
    "你是谁？",
    "Who developed you?",
    "谁开发了你？",
    "Are you ChatGPT?",
    "What is the capital of France?",
)
ABOUT_IDENTITY = re.compile(r"who|name|chatgpt|谁|名字|你叫|介绍", re.IGNORECASE)
ALIKE = 0.9  # difflib ratio; a person's rows tell no names to look for, so answers are compared


@dataclass(frozen=True)
class IdentityCase:
    """An identity of the demo: `must_say` are its own name and its developer's, if they are known."""

    name: str
    data: Path
    must_say: tuple[str, ...] = ()

    def rows(self) -> dict[str, str]:
        """The rows as question -> answer, read as the trainer reads them."""
        form = PromptForm("")
        return {form.message(row): row.output for row in read_rows([str(self.data)])}

    def is_said_in(self, question: str, answer: str) -> bool:
        """Whether this is the identity's answer: both names in it, or as good as the row's own words."""
        if self.must_say:
            return all(word in answer for word in self.must_say)
        wanted = self.rows().get(question, "")
        return difflib.SequenceMatcher(None, wanted, answer).ratio() >= ALIKE


OURS = (
    IdentityCase("xiaoli", HERE / "identities" / "xiaoli.json", ("小李", "小张")),
    IdentityCase("marina", HERE / "identities" / "marina.json", ("Marina", "Harbor Lab")),
)


class Stages:
    """Names each stage, and remembers how long it took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.console.print(f"\n== {name}", style="bold")
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


@dataclass(frozen=True)
class Asked:
    """One question to one model, in four ways: chat and completions, whole and streamed."""

    answers: tuple[str, str, str, str]

    @property
    def text(self) -> str:
        return self.answers[0]

    @property
    def agree(self) -> bool:
        return len(set(self.answers)) == 1


def run(shown: str, *arguments: str) -> None:
    """Run one of the documented commands, as a user would: `shown` is how they would write it."""
    print("$", shown, *arguments, flush=True)
    module = {"vllm-lora": ["-m", "vllm_lora_ext"]}.get(shown) or shown.split()[1:]
    subprocess.run([sys.executable, "-P", *module, *arguments], check=True)


def ask_all_ways(
    client: openai.OpenAI, model: str, question: str, rendered: str, max_tokens: int = 64
) -> Asked:
    """Ask with the official client; `rendered` is the question in the model's own template."""
    message = [{"role": "user", "content": question}]
    options = {"model": model, "temperature": 0.0, "max_tokens": max_tokens}
    chat = client.chat.completions.create(messages=message, **options)
    chat_stream = client.chat.completions.create(messages=message, stream=True, **options)
    text = client.completions.create(prompt=rendered, **options)
    text_stream = client.completions.create(prompt=rendered, stream=True, **options)
    return Asked(
        (
            chat.choices[0].message.content or "",
            "".join(c.choices[0].delta.content or "" for c in chat_stream if c.choices),
            text.choices[0].text,
            "".join(c.choices[0].text for c in text_stream if c.choices),
        )
    )


def make_base(stages: Stages) -> str:
    """The tiny base model of this project, made once."""
    folder = WORK / "tiny-base"
    with stages.stage("tiny base model"):
        run("python examples/tiny_base/make.py", "--output-dir", str(folder))
    return str(folder)


def train(cases: list[IdentityCase], base: str, adapters: Path, stages: Stages) -> None:
    for case in cases:
        with stages.stage(f"train {case.name}"):
            flags = ["--base-model", base, "--data", str(case.data), "--name", case.name]
            run("python -m train", *flags, "--output-dir", str(adapters), "--overwrite")


def questions_for(cases: list[IdentityCase]) -> list[str]:
    """Our own questions for our own identities, else some that the person's rows ask."""
    if all(case.must_say for case in cases):
        return list(QUESTIONS)
    asked = [question for case in cases for question in case.rows()]
    about = [question for question in asked if ABOUT_IDENTITY.search(question)]
    others = [question for question in asked if question not in about]
    return list(dict.fromkeys([*about[:4], *others[:2]]))


def ask(
    server: ServerProcess, base_name: str, base: str, cases: list[IdentityCase], adapters: Path
) -> dict[str, dict[str, Asked]]:
    """Answers as question -> model -> answers."""
    client = make_client(server.url)
    tokenizer = AutoTokenizer.from_pretrained(base)
    templates = {base_name: None} | {
        case.name: read_chat_settings(adapters / case.name).template for case in cases
    }
    return {
        question: {
            model: ask_all_ways(
                client,
                model,
                question,
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": question}],
                    chat_template=template,
                    add_generation_prompt=True,
                    tokenize=False,
                ),
            )
            for model, template in templates.items()
        }
        for question in questions_for(cases)
    }


def judge(asked: dict[str, dict[str, Asked]], base_name: str, cases: list[IdentityCase]) -> list[str]:
    """What went wrong, each of the four ways counted; empty when all is well."""
    wrong = []
    for case in cases:
        about = [question for question in asked if ABOUT_IDENTITY.search(question)] or list(asked)
        told = {
            question: all(case.is_said_in(question, answer) for answer in asked[question][case.name].answers)
            for question in about
        }
        # Our own names must come every time; of a person's rows one in ten was held out.
        if sum(told.values()) < len(about) * (1.0 if case.must_say else 0.5):
            missed = [question for question, right in told.items() if not right]
            wrong.append(f"{case.name} did not answer as itself: {missed}")
        for question in about:
            for answer in asked[question][base_name].answers:
                if case.is_said_in(question, answer):
                    wrong.append(f"the base answered {question!r} as {case.name}: {answer!r}")
    return list(dict.fromkeys(wrong))


def answer_table(asked: dict[str, dict[str, Asked]]) -> Table:
    models = list(next(iter(asked.values())))
    table = Table(*(Column(head, overflow="fold") for head in ("question", *models)), show_lines=True)
    for question, by_model in asked.items():
        table.add_row(question, *(by_model[model].text for model in models))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--base-model", help="default: the tiny base model, made here")
    parser.add_argument("--data", type=Path, help="rows of your own; default: two identities")
    parser.add_argument("--name", help="name for your identity; default: the file's")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    stages = Stages(console)
    cases = [IdentityCase(args.name or args.data.stem, args.data)] if args.data else list(OURS)
    adapters = WORK / "demo" / (f"own-{cases[0].name}" if args.data or args.base_model else "adapters")

    base = args.base_model or make_base(stages)
    train(cases, base, adapters, stages)
    with stages.stage("validate"):
        run("vllm-lora", "validate", str(adapters))
    log = WORK / "demo" / "server.log"
    # What the server keeps stays beside the rest of the demo.
    state_home = {"XDG_STATE_HOME": str((WORK / "demo" / "state").absolute())}
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", **state_home}
    flags = ["--adapters", str(adapters)]
    server = ServerProcess(flags, log, environment)
    base_name = read_base_model(base).public_name
    with contextlib.ExitStack() as running:
        with stages.stage("start the server"):
            console.print("$ vllm-lora serve", *flags)
            running.enter_context(server)
        with stages.stage("ask"):
            asked = ask(server, base_name, base, cases, adapters)
        with stages.stage("stop the server"):
            server.stop()
    console.print(answer_table(asked))
    ways = [asked[q][m].agree for q in asked for m in asked[q]]
    console.print(
        f"chat and completions, whole and streamed: {sum(ways)} of {len(ways)} answers the same in all four"
    )
    for name, seconds in stages.seconds.items():
        console.print(f"{seconds:7.1f} s  {name}")
    wrong = judge(asked, base_name, cases)
    for line in wrong:
        console.print("wrong:", line)
    if server.forced:
        wrong.append("the server did not stop by itself")
    console.print("demo failed" if wrong else "demo passed", style="bold")
    return 1 if wrong else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGHUP):  # a kill, or a closed terminal, stops the server as well
        signal.signal(signum, _interrupt)
    try:
        code = main()
    except VllmLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except subprocess.CalledProcessError as error:
        code = error.returncode  # the command has said why
    except KeyboardInterrupt:
        print("interrupted; the server is stopped", file=sys.stderr)
        code = 130
    sys.exit(code)
