"""How a command ends: 0 ok, 1 failed, 2 bad input, 130 interrupted. Errors go to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from vllm_lora_ext.errors import VllmLoraError

BAD_INPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def run_command(command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run `command` and turn our errors and Ctrl+C into a message and an exit code."""
    try:
        return command(argv)
    except VllmLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has had enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a path that no check of ours foresaw
        if error.filename is None:
            raise
        print(f"error: {str(error.filename)[:200]}: {error.strerror}.", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
