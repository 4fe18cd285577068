"""When a run evaluates what it has, writes a checkpoint, keeps its best weights, and stops early."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers

from train.checkpoints import BEST_FILE, Pace, save_weights
from train.config import TrainConfig

if TYPE_CHECKING:
    from train.probes import Prober
    from train.trainer import AnswerTrainer

_WORTH_ASKING = 0.9  # token accuracy since the last time; below it hardly an answer is right to its end


class Stopping(transformers.TrainerCallback):  # type: ignore[misc]
    """Decides after steps, epochs and evaluations.

    What it decides by stands in the trainer's log history and counts, which a checkpoint holds, so that a
    resumed run decides as an unbroken one. `reason` says why it stopped early.
    """

    def __init__(self, trainer: AnswerTrainer, config: TrainConfig, prober: Prober | None) -> None:
        self._trainer, self._config = trainer, config
        self._prober = prober if prober is not None and prober.decide else None
        self._pace = Pace(config.save_steps)
        self.reason: str | None = None
        self.last_evaluated = -1

    @property
    def _losses(self) -> list[tuple[float, int]]:
        history = self._trainer.state.log_history
        return [(entry["eval_loss"], int(entry["step"])) for entry in history if "eval_loss" in entry]

    @property
    def best_step(self) -> int | None:
        """The step with the lowest held-out loss, the earliest of equals; None before any evaluation."""
        return min(self._losses)[1] if self._losses else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self._pace.is_due(state.global_step, state.max_steps, epoch_ended=False)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Processes do not share a clock, and have to save together.
        together = args.world_size > 1 and not self._config.save_steps
        control.should_save |= together or self._pace.is_due(
            state.global_step, state.max_steps, epoch_ended=True
        )
        prober = self._prober
        if prober is not None and self._is_worth_asking() and prober.all_right(self._trainer.model):
            self.reason = f"all {len(prober.probes)} probes are right"
            control.should_training_stop = True
        self._trainer.since_probe = type(self._trainer.since_probe)()

    def _is_worth_asking(self) -> bool:
        count = self._trainer.since_probe
        right, counted = self._trainer.over_processes([count.right, count.counted])
        return right >= _WORTH_ASKING * counted

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last_evaluated = state.global_step
        if self._config.keep == "best" and self.best_step == state.global_step and args.should_save:
            save_weights(self._trainer.trained(), self._trainer.checkpoints.folder / BEST_FILE)
        patience, losses = self._config.early_stopping_patience, self._losses
        since_best = sum(step > (self.best_step or 0) for _, step in losses)
        if patience and since_best >= patience:
            self.reason = f"{since_best} evaluations without a better loss than at step {self.best_step}"
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._pace.saved()
