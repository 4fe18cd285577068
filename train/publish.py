"""A finished adapter handed to a running server, by the command that everybody has for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from train.config import TrainConfig
from vllm_lora_ext.errors import TrainingFailed


def check_server(url: str) -> None:
    """Ask the server before the first step what it will be asked after the last one.

    Raises:
        TrainingFailed: it does not answer, or the key (VLLM_LORA_ADMIN_KEY) is not the right one.
    """
    told = _command(["ls", "--url", url])
    if told is not None:
        raise TrainingFailed(f"--publish {url}", f"cannot be reached ({told})", "Start it, or leave it out.")


def publish(folder: str, config: TrainConfig) -> None:
    """Make the adapter live under its name; one that is served already is replaced with `--overwrite` only.

    Raises:
        TrainingFailed: the server does not take it. The folder stays as it is.
    """
    again = ["publish", folder, "--url", str(config.publish), *(["--replace"] if config.overwrite else [])]
    told = _command(again)
    if told is not None:
        rule = f"was trained, but not published ({told})"
        raise TrainingFailed(folder, rule, f"Do it with `vllm-lora {' '.join(again)}`.")


def _command(words: Sequence[str]) -> str | None:
    """None if it went well, else the last line that it said."""
    command = [sys.executable, "-m", "vllm_lora_ext", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return lines[-1].removeprefix("error: ").rstrip(".")
