"""The training loop: transformers' Trainer, with our loss, order of rows, checkpoints and reasons to stop."""

from __future__ import annotations

import errno
import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import transformers
from safetensors import SafetensorError

from train.batches import LengthBuckets, collate
from train.checkpoints import (
    BEST_FILE,
    COMPLETE_FILE,
    KEPT,
    WEIGHTS_FILE,
    Checkpoints,
    load_weights,
    save_weights,
)
from train.config import TrainConfig
from train.methods import base_dtype
from train.model import first_line
from train.progress import Progress
from train.prompts import Example
from train.stopping import Stopping
from vllm_lora_ext.errors import TrainingFailed

if TYPE_CHECKING:
    from train.methods import Trainable
    from train.probes import Prober

_COUNTS_FILE = "counts.json"


class Measured(NamedTuple):
    """Of a batch: summed loss, trained tokens that were the likeliest, trained tokens."""

    loss: torch.Tensor
    right: int
    counted: int


class SharedPasses(Protocol):
    """Passes over the base that a run shares with others (`train.joint`)."""

    def learn(self, inputs: dict[str, torch.Tensor], tokens: int) -> Measured:
        """Add the gradient of the summed loss divided by `tokens` to what is trained."""

    def look(self, inputs: dict[str, torch.Tensor]) -> Measured:
        """The same without a gradient."""


class Company(NamedTuple):
    """What a run has besides itself: passes that it shares, how it is shown, further callbacks, and what
    `identity.json` tells of it."""

    passes: SharedPasses | None = None
    progress: type[transformers.TrainerCallback] | transformers.TrainerCallback = Progress
    callbacks: Sequence[transformers.TrainerCallback] = ()
    provenance: Mapping[str, Any] = MappingProxyType({})


ALONE = Company()


@dataclass(frozen=True)
class TrainingResult:
    """Figures of a run. Accuracies are shares of trained tokens; eval is None without held-out rows.

    `stopped` says why it ended before its last planned step, if it did; `kept_step` whose weights are kept.
    `history` are the log records, as in training_log.jsonl.
    """

    steps: int
    seconds: float
    loss: float
    token_accuracy: float
    eval_loss: float | None
    eval_token_accuracy: float | None
    stopped: str | None
    kept_step: int
    history: list[dict[str, float]]


@dataclass
class _Count:
    """Trained tokens whose most likely prediction was right, and all of them."""

    right: int = 0
    counted: int = 0

    def add(self, right: int, counted: int) -> None:
        self.right, self.counted = self.right + right, self.counted + counted

    @property
    def share(self) -> float:
        return self.right / self.counted if self.counted else 0.0


class AnswerTrainer(transformers.Trainer):  # type: ignore[misc]
    """Trainer whose model answers with summed losses (`train.answer_loss`).

    The loss is a mean over all trained tokens of an optimizer step, however they fall into batches and
    processes. Every log record holds the token accuracy since the last one.
    """

    control: Any

    def __init__(
        self, *args: Any, checkpoints: Checkpoints, passes: SharedPasses | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._passes = passes
        self.model_accepts_loss_kwargs = True  # so that trained tokens are counted over a whole step
        self.loss_is_scaled_for_ga = True
        self.checkpoints = checkpoints
        self.since_log, self.since_probe = _Count(), _Count()
        self._walk_less()

    def _walk_less(self) -> None:
        """Spare Trainer three walks over all modules in every step, which a small model notices: one to set
        the mode that is set, two to look for gradients where nothing is trained."""
        model, plain_train = self.model, self.model.train
        self._trained = trained = list(self.trained().values())

        def train(mode: bool = True) -> Any:
            return model if model.training is mode else plain_train(mode)

        def zero_grad(set_to_none: bool = True) -> None:
            for parameter in trained:
                parameter.grad = None

        model.train, model.zero_grad = train, zero_grad

    def floating_point_ops(self, inputs: Any) -> int:
        """None are counted: nobody asks, and for each step it takes another walk over all modules."""
        return 0

    def _clip_grad_norm(self, model: Any) -> Any:
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if self._passes is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        measured = self._passes.learn(self._prepare_inputs(inputs), int(num_items_in_batch))
        self._count(measured)
        return measured.loss / int(num_items_in_batch)

    def _count(self, measured: Measured) -> None:
        for count in (self.since_log, self.since_probe):
            count.add(measured.right, measured.counted)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        self._count(_measured(outputs))
        tokens = outputs["counted"] if num_items_in_batch is None else num_items_in_batch
        loss = outputs["loss"] / tokens
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which averages gradients over processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss and accuracy over the trained tokens of all held-out rows."""
        model, sums = self.model, [0.0, 0.0, 0.0]
        was_training = model.training
        model.eval()
        for inputs in self.get_eval_dataloader(eval_dataset):
            for part, number in enumerate(self._look(self._prepare_inputs(inputs))):
                sums[part] += float(number)
        model.train(was_training)
        loss, right, counted = self.over_processes(sums)
        metrics = {
            f"{metric_key_prefix}_loss": loss / counted,
            f"{metric_key_prefix}_token_accuracy": round(right / counted, 4),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _look(self, inputs: dict[str, torch.Tensor]) -> Measured:
        if self._passes is not None:
            return self._passes.look(inputs)
        with torch.no_grad():
            return _measured(self.model(**inputs))

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            right, counted = self.over_processes([self.since_log.right, self.since_log.counted])
            logs = {**logs, "token_accuracy": round(right / max(counted, 1), 4)}
            self.since_log = _Count()
            if not math.isfinite(logs["loss"]):
                raise _no_number(self.checkpoints)
        super().log(logs, *args, **options)

    def over_processes(self, sums: Sequence[float]) -> list[float]:
        """The numbers summed over all processes of the run."""
        mine = torch.tensor(sums, dtype=torch.float64, device=self.args.device)
        return [float(value) for value in self.accelerator.reduce(mine, reduction="sum")]

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthBuckets:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(example.input_ids) for example in rows]
        together = self.args.train_batch_size * self.accelerator.num_processes  # one step, one wait
        return LengthBuckets(lengths, together, self.args.seed)

    def trained(self) -> dict[str, torch.Tensor]:
        """What is trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(self.trained(), folder / WEIGHTS_FILE)
        counts = [vars(self.since_log), vars(self.since_probe)]
        (folder / _COUNTS_FILE).write_text(json.dumps(counts))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_weights(self.model, folder / WEIGHTS_FILE)
        counts = json.loads((folder / _COUNTS_FILE).read_text())
        self.since_log, self.since_probe = (_Count(**count) for count in counts)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint and mark it whole; what could not be written is removed."""
        place = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (place / COMPLETE_FILE).touch()
        except Exception as error:  # torch and safetensors each say in their own way that a disk is full
            shutil.rmtree(place, ignore_errors=True)
            rule = f"could not be written ({first_line(error)})"
            raise TrainingFailed(str(place), rule, self.checkpoints.way_back()) from error


def _measured(outputs: Any) -> Measured:
    return Measured(outputs["loss"], int(outputs["right"]), outputs["counted"])


def run_training(
    model: Trainable,
    training: Sequence[Example],
    held_out: Sequence[Example],
    config: TrainConfig,
    learning_rate: float,
    pad: int,
    checkpoints: Checkpoints,
    resume_from: Path | None = None,
    prober: Prober | None = None,
    company: Company = ALONE,
) -> TrainingResult:
    """Train `model` in place, which answers by `train.answer_loss`; go on from a checkpoint if one is given.

    Raises:
        TrainingFailed: the loss or a weight is no number, memory or the disk is full.
    """
    trainer = AnswerTrainer(
        model=model,
        args=_arguments(config, learning_rate, checkpoints.folder, bool(held_out)),
        train_dataset=list(training),
        eval_dataset=list(held_out) or None,
        data_collator=lambda examples: collate(examples, pad),
        checkpoints=checkpoints,
        passes=company.passes,
    )
    stopping = Stopping(trainer, config, prober)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    for callback in (company.progress, stopping, *company.callbacks):
        trainer.add_callback(callback)
    with explained(checkpoints):
        outcome = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if held_out and stopping.last_evaluated != trainer.state.global_step:
            trainer.evaluate()
        kept = trainer.state.global_step
        if config.keep == "best" and stopping.best_step is not None:
            trainer.accelerator.wait_for_everyone()  # the first process writes them
            load_weights(model, checkpoints.folder / BEST_FILE)
            kept = stopping.best_step
    if not (math.isfinite(outcome.training_loss) and _weights_are_finite(model)):
        raise _no_number(checkpoints)
    return _result(trainer, outcome, stopping.reason, kept)


@contextmanager
def explained(checkpoints: Checkpoints) -> Iterator[None]:
    """Turns a lack of memory or of space, whoever notices it, into an error that says how to go on.

    Raises:
        TrainingFailed: in place of that.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory", text, re.IGNORECASE):
            rule = "needs more memory than there is"
            fix = "Add --gradient-checkpointing, or begin anew with a smaller batch or --max-length. "
            raise TrainingFailed("the training", rule, fix + checkpoints.way_back()) from error
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "StorageFull" in text:
            fix = "Free some space. " + checkpoints.way_back()
            raise TrainingFailed(str(checkpoints.folder), "the disk is full", fix) from error
        raise


def _result(trainer: AnswerTrainer, outcome: Any, stopped: str | None, kept: int) -> TrainingResult:
    history = trainer.state.log_history
    of_kept = [entry for entry in history if entry["step"] == kept] or history
    return TrainingResult(
        steps=outcome.global_step,
        seconds=outcome.metrics["train_runtime"],
        loss=_last(history, "loss") or outcome.training_loss,
        token_accuracy=_last(history, "token_accuracy") or trainer.since_log.share,
        eval_loss=_last(of_kept, "eval_loss"),
        eval_token_accuracy=_last(of_kept, "eval_token_accuracy"),
        stopped=stopped,
        kept_step=kept,
        history=history,
    )


def _arguments(
    config: TrainConfig, learning_rate: float, folder: Path, evaluates: bool
) -> transformers.TrainingArguments:
    on_gpu, dtype = torch.cuda.is_available(), base_dtype(config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        eval_strategy=("steps" if config.eval_steps else "epoch") if evaluates else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="no",  # `Stopping` says when
        save_total_limit=KEPT,
        report_to=[name for name in config.report_to if name != "none"],
        run_name=config.name,
        disable_tqdm=True,  # our own bar
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        prediction_loss_only=True,
        # Only what is float32 to keep small steps needs to be told to compute in 16 bits.
        bf16=on_gpu and config.method == "full" and torch.cuda.is_bf16_supported(),
        fp16=on_gpu and dtype == torch.float16,
    )
    if arguments.n_gpu > 1:  # one process, one GPU; several take `torchrun`
        arguments._n_gpu = 1
    return arguments


def _weights_are_finite(model: torch.nn.Module) -> bool:
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def _no_number(checkpoints: Checkpoints) -> TrainingFailed:
    rule = "left the range of numbers (NaN or infinite)"
    fix = "Lower --learning-rate, and begin anew with --overwrite."
    if checkpoints.last() is None:
        checkpoints.remove()
    return TrainingFailed("the training", rule, fix)


def _last(history: Sequence[dict[str, float]], key: str) -> float | None:
    return next((entry[key] for entry in reversed(history) if key in entry), None)
