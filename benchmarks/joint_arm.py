"""Child process of `bench_joint_training`: identities trained together, or one after another, on random rows.

One base in memory either way; each identity has rows, adapter, optimizer and Trainer of its own.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys
import tempfile
from typing import Any

import transformers

from benchmarks.training_arm import QKV, RANK, Clock, matrix_rate, random_rows
from serve.machine import take_precedence
from train.answer_loss import use_answer_loss
from train.attention import use_short_row_attention
from train.batches import collate
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.fused import fuse
from train.joint.company import LanePasses, Turns
from train.joint.lanes import Lane, run_together
from train.joint.model import copy_over, joint_model
from train.joint.own_state import OwnState
from train.joint.passes import Passes
from train.methods import add_adapter, prepare_base
from train.model import load_tokenizer
from train.trainer import Company, run_training


class Identities:
    """`count` of them over one base; `rows` each, seen once, `batch_size` of them in a step."""

    def __init__(self, base: str, count: int, rows: int, batch_size: int, dtype: str, scratch: str) -> None:
        common = TrainConfig(
            base_model=base,
            data=("rows",),
            name="bench",
            output_dir=scratch,
            target_modules=QKV,
            lora_r=RANK,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1.0,
            logging_steps=1000,
            save_steps=100_000,
            dtype=dtype,
        )
        self.base = prepare_base(common)
        self.tokenizer = load_tokenizer(base)
        vocabulary = self.base.config.vocab_size
        self.configs = [
            dataclasses.replace(common, name=f"i{number}", seed=number) for number in range(count)
        ]
        self.rows = [random_rows(rows, config.seed, vocabulary) for config in self.configs]
        self.states: list[OwnState] = []
        self.models = [self._model(config) for config in self.configs]
        self.clocks = [Clock() for _ in self.configs]

    def _model(self, config: TrainConfig) -> Any:
        transformers.set_seed(config.seed)
        model = add_adapter(copy_over(self.base), config)
        use_answer_loss(model.get_base_model())
        use_short_row_attention(model.get_base_model())
        fuse(model)
        self.states.append(OwnState())
        return model

    def warm(self) -> None:
        """One pass, which brings the base's weights into memory: no part of what is measured."""
        model = self.models[0]
        model(**collate(self.rows[0][:8], 0))["loss"].backward()
        model.zero_grad()

    def train(self, number: int, company: Company) -> None:
        """One identity from its first step to its last."""
        config, model = self.configs[number], self.models[number]
        checkpoints = Checkpoints(config)
        checkpoints.begin()
        rate = min(2e-3, 1 / model.config.hidden_size)
        run_training(model, self.rows[number], [], config, rate, 0, checkpoints, company=company)

    def one_after_another(self) -> float:
        """Seconds from the first step to the last one, without what lies between two runs."""
        for number in range(len(self.configs)):
            self.train(number, Company(callbacks=[self.clocks[number]]))
        return sum(clock.seconds for clock in self.clocks)

    def together(self, mode: str, most_tokens: int) -> float:
        """Seconds from when all are at their first step, when passes begin, to the last one of any."""
        answer: Any = lambda asked: {}  # noqa: E731
        if mode == "fast":
            models = {config.name: model for config, model in zip(self.configs, self.models, strict=True)}
            answer = Passes(joint_model(self.base, models), self.tokenizer, most_tokens).answer

        def work(number: int) -> Any:
            def train(lane: Lane) -> None:
                turns = Turns(lane, Checkpoints(self.configs[number]), asks=mode == "exact")
                passes = LanePasses(lane, False) if mode == "fast" else None
                self.train(number, Company(passes, callbacks=[self.clocks[number], turns]))

            return train

        lanes = [Lane(c.name, work(n), self.states[n]) for n, c in enumerate(self.configs)]
        run_together(lanes, answer)
        for lane in lanes:
            if lane.error is not None:
                raise lane.error
        return max(clock.ended for clock in self.clocks) - max(clock.began for clock in self.clocks)


def main() -> None:
    """One arm, told by a JSON object; the last line is the JSON of its figures."""
    take_precedence()
    order = json.loads(sys.argv[1])
    kind, tokens = order.pop("kind"), order.pop("tokens_per_pass", 4096)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        identities = Identities(**order, scratch=scratch)
        identities.warm()
        seconds = identities.one_after_another() if kind == "alone" else identities.together(kind, tokens)
    samples = order["count"] * order["rows"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    rate = matrix_rate("bfloat16")
    figures = {"seconds": seconds, "samples_per_s": samples / seconds, "peak_mib": peak, "matrix_flops": rate}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
