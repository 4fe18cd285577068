"""Child process of `bench_training`: one run of one way to train, in memory of its own.

The arms: `classic`, the script that many people start from (transformers' Trainer, PEFT on q, k and v, rank
8, float32, one row a step, padded by DataCollatorForSeq2Seq); `trl`, SFTTrainer in bfloat16; `ours`.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from serve.machine import take_precedence
from train.answer_loss import use_answer_loss
from train.attention import use_short_row_attention
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.fused import fuse
from train.methods import prepare_model
from train.model import load_base, load_tokenizer
from train.probes import Prober, make_probes
from train.prompts import Example, encode_rows, prompt_form
from train.rows import Row
from train.trainer import Company, run_training

QKV = ("q_proj", "k_proj", "v_proj")
RANK = 8
CLASSIC_RATE = 5e-5


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """Wall-clock seconds from the first step's begin to the last one's end, less what `pause` took.

    Asks the probes after each epoch, if there are any, and stops when all are right; for the others' arms
    that takes no time.
    """

    def __init__(self, prober: Prober | None = None) -> None:
        self._prober, self._paused = prober, 0.0
        self.began = self.ended = self.seconds = 0.0
        self.all_right = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended = time.perf_counter()
        self.seconds = self.ended - self.began - self._paused

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._prober is not None:
            began = time.perf_counter()
            self.all_right = self._prober.all_right(model)
            control.should_training_stop |= self.all_right
            self._paused += time.perf_counter() - began


def random_rows(count: int, seed: int, vocabulary: int) -> list[Example]:
    """Rows as an identity has them: 68 tokens on average, 44 % of them trained."""
    chance = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt, answer = chance.randint(24, 52), chance.randint(16, 44)
        ids = tuple(chance.choices(range(1, vocabulary), k=prompt + answer))
        rows.append(Example(ids, ((prompt, prompt + answer),)))
    return rows


class Arm:
    """A way to train `base` on random rows, or on the rows of `identity`."""

    def __init__(self, kind: str, base: str, batch_size: int, identity: str | None = None) -> None:
        self.kind, self.base, self.batch_size = kind, base, batch_size
        self.tokenizer = load_tokenizer(base)
        self.vocabulary = json.loads((Path(base) / "config.json").read_text())["vocab_size"]
        self.identity = identity
        transformers.utils.logging.set_verbosity_error()

    def rows(self, count: int, seed: int, template: str) -> tuple[list[Example], Prober | None]:
        if self.identity is None:
            return random_rows(count, seed, self.vocabulary), None
        from train.data import read_rows

        rows: list[Row] = read_rows([self.identity])
        form = prompt_form(template, self.tokenizer)
        examples, _ = encode_rows(rows, form, self.tokenizer, 256)
        must_hold = ["Who are you?=小李", "你是谁？=小李", "Who developed you?=小张", "谁开发了你？=小张"]
        return examples, Prober(make_probes(must_hold, rows, form, self.tokenizer, None), self.tokenizer)

    def run(self, count: int, seed: int, rate: float | None, epochs: float = 1.0) -> dict[str, Any]:
        """Seconds and samples seen of one run over the rows."""
        examples, prober = self.rows(count, seed, "chat" if self.kind == "ours" else "classic")
        if prober is None:
            examples = examples[:count]
        with tempfile.TemporaryDirectory() as scratch:
            run = {"ours": self._ours, "classic": self._classic, "trl": self._trl}[self.kind]
            result = run(examples, prober, seed, rate, epochs, scratch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return {**result, "tokens": sum(len(e.input_ids) for e in examples), "peak_mib": peak}

    def _ours(
        self,
        examples: list[Example],
        prober: Prober | None,
        seed: int,
        rate: float | None,
        epochs: float,
        scratch: str,
    ) -> dict[str, Any]:
        config = TrainConfig(
            base_model=self.base,
            data=("rows",),
            name="bench",
            output_dir=scratch,
            target_modules=QKV if prober is None else TrainConfig.target_modules,
            lora_r=RANK if prober is None else TrainConfig.lora_r,
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=epochs,
            logging_steps=1000,
            seed=seed,
        )
        transformers.set_seed(seed)
        model = prepare_model(config)
        use_answer_loss(model.get_base_model())
        use_short_row_attention(model.get_base_model())
        fuse(model)
        checkpoints = Checkpoints(config)
        checkpoints.begin()
        clock = Clock()
        rate = rate or min(2e-3, 1 / model.config.hidden_size)
        company = Company(callbacks=[clock])
        result = run_training(model, examples, [], config, rate, 0, checkpoints, None, prober, company)
        right = result.stopped is not None
        return {"seconds": clock.seconds, "steps": result.steps, "all_right": right, "loss": result.loss}

    def _peft(self, dtype: torch.dtype, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model

        transformers.set_seed(seed)
        lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=list(QKV))
        return get_peft_model(load_base(self.base, dtype), lora)

    def _classic(
        self,
        examples: list[Example],
        prober: Prober | None,
        seed: int,
        rate: float | None,
        epochs: float,
        scratch: str,
    ) -> dict[str, Any]:
        self._give_pad()
        rows = [
            {
                "input_ids": list(e.input_ids),
                "labels": list(e.labels),
                "attention_mask": [1] * len(e.input_ids),
            }
            for e in examples
        ]
        clock = Clock(prober)
        trainer = transformers.Trainer(
            model=self._peft(torch.float32, seed),
            args=self._arguments(transformers.TrainingArguments, 1, seed, rate, epochs, scratch),
            train_dataset=rows,
            data_collator=transformers.DataCollatorForSeq2Seq(self.tokenizer, padding=True),
            callbacks=[clock],
        )
        outcome = trainer.train()
        return {
            "seconds": clock.seconds,
            "steps": outcome.global_step,
            "all_right": clock.all_right,
            "loss": outcome.training_loss,
        }

    def _trl(
        self,
        examples: list[Example],
        prober: Prober | None,
        seed: int,
        rate: float | None,
        epochs: float,
        scratch: str,
    ) -> dict[str, Any]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        self._give_pad()
        rows = [
            {
                "input_ids": list(e.input_ids),
                "completion_mask": [0] * e.prompt_length + [1] * e.trained_tokens,
            }
            for e in examples
        ]
        clock = Clock(prober)
        args = self._arguments(
            SFTConfig, self.batch_size, seed, rate, epochs, scratch, bf16=True, max_length=1024
        )
        trainer = SFTTrainer(
            model=self._peft(torch.bfloat16, seed),
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[clock],
        )
        outcome = trainer.train()
        return {
            "seconds": clock.seconds,
            "steps": outcome.global_step,
            "all_right": clock.all_right,
            "loss": outcome.training_loss,
        }

    def _give_pad(self) -> None:
        """transformers gives the random base an end token that its embeddings have no row for."""
        pad = self.tokenizer.pad_token_id
        if pad is None or pad >= self.vocabulary:
            self.tokenizer.eos_token = self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(0)

    @staticmethod
    def _arguments(
        kind: Any, batch_size: int, seed: int, rate: float | None, epochs: float, scratch: str, **more: Any
    ) -> Any:
        return kind(
            output_dir=scratch,
            per_device_train_batch_size=batch_size,
            num_train_epochs=epochs,
            learning_rate=rate or CLASSIC_RATE,
            seed=seed,
            logging_steps=10_000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=False,
            **more,
        )


def matrix_rate(dtype: str, tokens: int = 2048, width: int = 896, inner: int = 4864) -> float:
    """FLOP/s of a product of (tokens, width) and (width, inner), the best of several."""
    x = torch.randn(tokens, width).to(getattr(torch, dtype))
    weight = torch.randn(inner, width).to(x.dtype)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2 * tokens * width * inner / best


def main() -> None:
    """One run, told by a JSON object of `setup` and `run`; the last line is the JSON of its figures."""
    take_precedence()
    order = json.loads(sys.argv[1])
    print(json.dumps(Arm(**order["setup"]).run(**order["run"])))


if __name__ == "__main__":
    main()
