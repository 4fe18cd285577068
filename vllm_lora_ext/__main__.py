"""`python -m vllm_lora_ext` is the command `vllm-lora`, for where scripts are not on the path."""

import sys

from vllm_lora_ext.command import command_line

if __name__ == "__main__":
    sys.exit(command_line())
