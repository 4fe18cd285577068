"""Child process of `bench_lora_tax`: one engine that runs what it is told on stdin, a JSON object a line.

The first line is the setup. Each answer is a JSON line on the file descriptor
that stands as the only argument. Between two lines the process blocks.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from typing import Any

from serve.machine import take_precedence


class Arm:
    """A `vllm.LLM` and the adapters of every load, in the order in which requests take them in turn."""

    def __init__(
        self, engine: dict[str, Any], loads: dict[str, list[tuple[int, str]]], vocabulary: int
    ) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self.vocabulary = vocabulary
        self.adapters = {
            name: [LoRARequest(f"adapter-{number}", number, path) for number, path in adapters] or [None]
            for name, adapters in loads.items()
        }
        self.llm = LLM(**engine, skip_tokenizer_init=True, disable_log_stats=True)

    def generate(self, load: str, seed: int, prompts: int, prompt_tokens: int, output_tokens: int) -> float:
        """Seconds for all requests of random token ids; request i uses adapter i modulo their number."""
        from vllm import SamplingParams

        chance = random.Random(seed)
        ids = [chance.choices(range(1, self.vocabulary), k=prompt_tokens) for _ in range(prompts)]
        adapters = self.adapters[load]
        chosen = [adapters[i % len(adapters)] for i in range(prompts)]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        started = time.perf_counter()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in ids],
            sampling,
            use_tqdm=False,
            lora_request=None if chosen[0] is None else chosen,
        )
        seconds = time.perf_counter() - started
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == prompts * output_tokens
        return seconds

    def measure(self, load: str, seed: int, **workload: int) -> float:
        """Seconds of `generate`, after a short untimed one that puts the load's adapters into their slots."""
        self.generate(load, seed, prompts=len(self.adapters[load]), prompt_tokens=4, output_tokens=2)
        return self.generate(load, seed, **workload)


def main() -> None:
    """Answer until stdin ends."""
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as answers:
        arm = Arm(**json.loads(sys.stdin.readline()))
        print(json.dumps({"has_precedence": take_precedence()}), file=answers)
        for line in sys.stdin:
            print(json.dumps({"seconds": arm.measure(**json.loads(line))}), file=answers)


if __name__ == "__main__":
    main()
