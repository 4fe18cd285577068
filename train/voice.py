"""What a run tells people on stderr; stdout is data."""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from train.trainer import TrainingResult

speaker: ContextVar[str] = ContextVar("speaker", default="")  # in front of what one of several runs says


def say(line: str) -> None:
    """One line, with the speaker in front. Of several processes one speaks."""
    if is_first_process():
        name = speaker.get()
        line = f"{name}: {line}" if name else line
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.write(line, file=sys.stderr)  # above the bars, if there are any
        else:
            print(line, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process writes; there are several under `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """How many processes train together, each with its own rows of a step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say_result(result: TrainingResult) -> None:
    """Steps, loss and accuracy, and why it ended early if it did."""
    held = (
        f"held out {result.eval_loss:.4f}, accuracy {result.eval_token_accuracy:.1%}"
        if result.eval_loss is not None and result.eval_token_accuracy is not None
        else "nothing held out"
    )
    say(
        f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}, "
        f"token accuracy {result.token_accuracy:.1%}; {held}"
    )
    if result.stopped:
        say(f"stopped early: {result.stopped}")
    if result.kept_step != result.steps:
        say(f"kept: the weights of step {result.kept_step}")


def say_probes(before: list[str] | None, probes: list[dict[str, Any]]) -> None:
    """Each probe's answers before and after."""
    for number, probe in enumerate(probes):
        say(f"  {probe['question']}")
        if before is not None:
            say(f"    before: {before[number]}")
        say(f"    after:  {probe['answer']}")
    wrong = [probe for probe in probes if not probe["right"]]
    if wrong:
        asked = ", ".join(f"{probe['question']!r} has no {probe['must_hold']!r}" for probe in wrong)
        say(f"warning: {len(wrong)} of {len(probes)} probes are wrong: {asked}. Train longer, or add rows.")
