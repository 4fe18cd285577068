"""The training loop: transformers' Trainer, with loss and token accuracy on answers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

from train.config import TrainConfig
from train.progress import Progress
from train.prompts import IGNORED, Example
from vllm_lora_ext.errors import TrainingFailed

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class TrainingResult:
    """Figures of a run. Accuracies are shares of answer tokens; eval is None without held-out rows."""

    steps: int
    seconds: float
    loss: float
    token_accuracy: float
    eval_loss: float | None
    eval_token_accuracy: float | None


def collate(examples: Sequence[Example], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded tensors `input_ids`, `attention_mask` and `labels`, each (rows, longest)."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    batch = {
        "input_ids": torch.full(shape, pad),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED),
    }
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        batch["input_ids"][row, :length] = torch.tensor(example.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = torch.tensor(example.labels)
    return batch


def count_correct(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int]:
    """Answer tokens whose most likely prediction is right, and all answer tokens.

    `logits` is (rows, length, vocabulary), `labels` (rows, length); position i predicts label i + 1.
    """
    predicted, wanted = logits[:, :-1].argmax(dim=-1), labels[:, 1:]
    counted = wanted != IGNORED
    return int(((predicted == wanted) & counted).sum()), int(counted.sum())


class AnswerTrainer(transformers.Trainer):  # type: ignore[misc]
    """Trainer that adds the token accuracy since the last record to every log record."""

    right = counted = 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        wants_outputs = options.pop("return_outputs", False)
        loss, outputs = super().compute_loss(model, inputs, *args, return_outputs=True, **options)
        right, counted = count_correct(outputs.logits.detach(), inputs["labels"])
        self.right, self.counted = self.right + right, self.counted + counted
        return (loss, outputs) if wants_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if self.counted:
            key = "eval_token_accuracy" if "eval_loss" in logs else "token_accuracy"
            logs = {**logs, key: round(self.right / self.counted, 4)}
            self.right = self.counted = 0
        super().log(logs, *args, **options)


def run_training(
    model: PeftModel,
    training: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    learning_rate: float,
    pad: int,
    scratch_dir: str,
) -> TrainingResult:
    """Train `model` in place; `held_out` is evaluated once, at the end.

    Raises:
        TrainingFailed: the loss or a weight is no number.
    """
    trainer = AnswerTrainer(
        model=model,
        args=_arguments(config, learning_rate, scratch_dir, next(model.parameters())),
        train_dataset=list(training),
        eval_dataset=list(held_out) or None,
        data_collator=lambda examples: collate(examples, pad),
    )
    trainer.remove_callback(transformers.ProgressCallback)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(Progress())
    outcome = trainer.train()
    if not (math.isfinite(outcome.training_loss) and _weights_are_finite(model)):
        fix = "Lower --learning-rate; nothing was saved."
        raise TrainingFailed("the training", "left the range of numbers (NaN or infinite)", fix)
    if held_out:
        trainer.evaluate()
    history = trainer.state.log_history
    return TrainingResult(
        steps=outcome.global_step,
        seconds=outcome.metrics["train_runtime"],
        loss=_last(history, "loss") or outcome.training_loss,
        token_accuracy=_last(history, "token_accuracy") or 0.0,
        eval_loss=_last(history, "eval_loss"),
        eval_token_accuracy=_last(history, "eval_token_accuracy"),
    )


def _arguments(
    config: TrainConfig, learning_rate: float, scratch_dir: str, parameter: torch.Tensor
) -> transformers.TrainingArguments:
    on_gpu = parameter.device.type == "cuda"
    return transformers.TrainingArguments(
        output_dir=scratch_dir,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        disable_tqdm=True,  # our own bar
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        bf16=on_gpu and parameter.dtype == torch.bfloat16,
        fp16=on_gpu and parameter.dtype == torch.float16,
        prediction_loss_only=True,
    )


def _weights_are_finite(model: PeftModel) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def _last(history: list[dict[str, float]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)
