"""The command `vllm-lora`: a table of small commands. Each takes argv and returns an exit code.

stdout is data, stderr is everything else; 0 ok, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from vllm_lora_ext import __version__
from vllm_lora_ext.exit_codes import run_command

# verb -> (`module:function(argv) -> int`, what it does); a module is imported only when it is asked for
COMMANDS = {
    "train": (
        "train.__main__:main",
        "train an adapter, or a whole model, from rows of questions and answers",
    ),
    "validate": ("serve.validate:main", "say whether adapters may be served, and if not, why"),
    "show": ("serve.versions:show", "show an adapter's folder, or a published name with its versions"),
    "diff": ("serve.diff:main", "say what sets two adapters apart: settings, modules, answers"),
    "serve": ("serve.launch:main", "serve a base model and a folder of adapters"),
    "ls": ("serve.versions:list_names", "list the adapters; --live: where each is, and how it is used"),
    "ps": ("serve.versions:list_live", "the same as `ls --live`"),
    "publish": ("serve.versions:publish_folder", "check an adapter and make it the live version of its name"),
    "rollback": ("serve.versions:rollback", "make an earlier version live again"),
    "traffic": ("serve.versions:traffic", "split the requests for a name over its versions"),
    "rm": ("serve.versions:remove", "take names out of service"),
    "chat": ("serve.chat:main", "ask a running server, or --local: base and adapter side by side"),
    "convert": ("train.convert:main", "make of any PEFT adapter a LoRA that vLLM serves, and check it"),
    "merge": ("train.merge:main", "make one full model of an adapter and its base"),
    "loadtest": ("serve.loadtest.__main__:main", "measure a running server, adapter by adapter"),
    "env": ("serve.environment:main", "print versions, device and cores, and what is missing"),
}


def usage() -> str:
    lines = [f"vllm-lora {__version__}: one base model, many identities", "", "commands:"]
    lines += [f"  {verb:9} {text}" for verb, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "`vllm-lora COMMAND --help` tells its flags."])


def main(argv: Sequence[str]) -> int:
    """Run one command and turn our errors into a message and an exit code."""
    verb, rest = (argv[0] if argv else "--help"), list(argv[1:])
    if verb in ("-h", "--help", "help"):
        print(usage())
        return 0
    if verb in ("-V", "--version"):
        print(__version__)
        return 0
    if verb not in COMMANDS:
        print(f"error: {verb!r} is no command\n\n{usage()}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[verb][0].partition(":")
    command: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
    return run_command(command, rest)
