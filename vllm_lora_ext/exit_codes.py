"""How a command ends: 0 ok, 1 failed, 2 bad input, 130 interrupted. Errors go to stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from vllm_lora_ext.errors import VllmLoraError

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run `command` and turn our errors and Ctrl+C into a message and an exit code."""
    try:
        return command(argv)
    except VllmLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
