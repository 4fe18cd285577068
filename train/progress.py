"""What a person sees while it trains: one bar, and a line of loss and token accuracy now and then."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import transformers
from tqdm import tqdm


def log_line(step: int, logs: Mapping[str, Any]) -> str | None:
    """One line for one of Trainer's log records; None for a record that says nothing new."""
    if "eval_loss" in logs:
        return f"step {step:5}  held out: loss {logs['eval_loss']:.4f}" + _accuracy(logs, "eval_")
    if "loss" in logs:
        rate = f"  learning rate {logs['learning_rate']:.1e}"
        return f"step {step:5}  loss {float(logs['loss']):.4f}" + _accuracy(logs, "") + rate
    return None


def _accuracy(logs: Mapping[str, Any], prefix: str) -> str:
    share = logs.get(f"{prefix}token_accuracy")
    return "" if share is None else f"  token accuracy {share:6.1%}"


class Progress(transformers.TrainerCallback):  # type: ignore[misc]
    """Takes the place of Trainer's own bar and of its raw dictionaries."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every_s = 0.1 if sys.stderr.isatty() else 10.0  # a log file gets few lines
        self._bar = tqdm(total=state.max_steps, desc="training", unit="step", mininterval=every_s)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        line = log_line(state.global_step, logs or {})
        if line and sys.stderr.isatty() and self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif line:  # in a file, each line that passes the bar would draw it anew
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
