"""A run's side of a joint one: what it asks the others for, when it gives up its turn, how it is shown."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from train.joint.lanes import Lane
from train.joint.passes import Batch, Questions
from train.probes import Prober
from train.trainer import Measured
from vllm_lora_ext.errors import TrainingFailed

if TYPE_CHECKING:
    from train.checkpoints import Checkpoints

CANCEL_FILE = "cancel"  # in the folder of a run's checkpoints: whoever makes it ends this run alone
_LONGEST_SEED = 2**62


class LanePasses:
    """`train.trainer.SharedPasses` of one lane."""

    def __init__(self, lane: Lane, has_dropout: bool) -> None:
        self._lane, self._has_dropout = lane, has_dropout

    def learn(self, inputs: dict[str, torch.Tensor], tokens: int) -> Measured:
        # Drawn from the run's own generator, which a checkpoint holds.
        seed = int(torch.randint(_LONGEST_SEED, ())) if self._has_dropout else None
        return self._ask(inputs, tokens, seed)

    def look(self, inputs: dict[str, torch.Tensor]) -> Measured:
        return self._ask(inputs)

    def _ask(
        self, inputs: dict[str, torch.Tensor], tokens: int | None = None, seed: int | None = None
    ) -> Measured:
        measured: Measured = self._lane.ask(Batch(inputs["input_ids"], inputs["labels"], tokens, seed))
        return measured


class LaneProber(Prober):
    """Asks its questions together with those of others; `lane` is set before the first one."""

    lane: Lane

    def answer_ids(self, model: Any) -> list[list[int]]:
        """As `Prober.answer_ids`, of the shared model."""
        if not self.probes:
            return []
        answers: list[list[int]] = self.lane.ask(Questions(self.probes))
        return answers


class Turns(transformers.TrainerCallback):  # type: ignore[misc]
    """Gives the others a turn before each step, and ends the run if somebody cancelled it."""

    def __init__(self, lane: Lane, checkpoints: Checkpoints, asks: bool) -> None:
        self._lane, self._checkpoints, self._asks = lane, checkpoints, asks
        self._cancel = Path(checkpoints.folder) / CANCEL_FILE

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._cancel.exists():
            self._cancel.unlink()
            raise TrainingFailed("the training", "was cancelled", self._checkpoints.way_back())
        if self._asks:
            self._lane.ask(None)


class LaneProgress(transformers.TrainerCallback):  # type: ignore[misc]
    """One line for an identity: step, loss, token accuracy, time left; in a file, a line for each record."""

    def __init__(self, name: str, position: int, width: int) -> None:
        self._name, self._position = name.ljust(width), position
        self._bar: tqdm[Any] | None = None
        self._began, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._first = time.monotonic(), state.global_step
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self._name,
                unit="step",
                position=self._position,
                bar_format="{desc} {percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix}, {remaining} left",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        kind = "eval_" if "eval_loss" in logs else ""
        if f"{kind}loss" not in logs:
            return
        told = f"{'held out ' if kind else ''}loss {float(logs[f'{kind}loss']):.4f}"
        told += f", token accuracy {logs[f'{kind}token_accuracy']:.1%}"
        if self._bar is None:
            steps = f"step {state.global_step}/{state.max_steps}"
            print(f"{self._name} {steps}, {told}, {self._left(state)}", file=sys.stderr, flush=True)
        elif not kind:
            self._bar.set_postfix_str(told, refresh=False)

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first
        if not done:
            return "time left unknown"
        seconds = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
        return f"{seconds:.0f} s left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
