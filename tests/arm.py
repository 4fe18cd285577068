"""One engine in a process of its own, told by lines of JSON what to do: with our plugin or plain vLLM.

Run as a program it is the child; `Arm` is the parent's end. A child that dies or hangs harms no test.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_lora_ext.collector import collect_seldom

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 240.0


class ArmDied(Exception):
    """The child ended; `code` is its exit code, negative for a signal."""

    def __init__(self, code: int, log: str) -> None:
        self.code = code
        super().__init__(f"ended with {code}:\n{log}")


class ArmHangs(Exception):
    """The child did not answer in time."""


class EngineFailed(Exception):
    """What was asked raised an error in the child."""


class Arm:
    """An engine over `base`; `plugin` tells whether ours is loaded, `settings` are those of `vllm.LLM`.

    With `one_process` the engine runs in the child itself, which adds all requests before the first
    step, so that batches are the same from run to run.
    """

    def __init__(
        self,
        base: Path,
        log: Path,
        plugin: bool,
        one_process: bool = False,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        environment = {
            **os.environ,
            "VLLM_PLUGINS": "vllm_lora" if plugin else "",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one_process else "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            **(environment or {}),
        }
        self._log, self.dtype = log, settings.get("dtype")
        with log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "tests.arm", json.dumps({"model": str(base), **settings})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                start_new_session=True,
                cwd=ROOT,
            )
        self._started = False

    def __enter__(self) -> Arm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the child with everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()

    def __call__(self, what: str, timeout_s: float = 60.0, **arguments: Any) -> Any:
        """Do `what` in the child.

        Raises:
            EngineFailed, ArmDied, ArmHangs: it raised, the child ended, or it took longer.
        """
        if not self._started:
            self._answer(START_TIMEOUT_S)
            self._started = True
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps({"what": what, **arguments}).encode() + b"\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise ArmDied(self._child.wait(), self._tail()) from None
        return self._answer(timeout_s)

    def generate(self, rows: list[tuple[list[int], str | None]], **options: Any) -> list[dict[str, Any]]:
        """Answers to prompts (token ids), each with the name of its adapter or None."""
        answers: list[dict[str, Any]] = self("generate", rows=rows, **options)
        return answers

    def _answer(self, timeout_s: float) -> Any:
        assert self._child.stdout is not None
        deadline = time.monotonic() + timeout_s
        while True:
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise ArmHangs(f"no answer for {timeout_s:.0f} s")
            line = self._child.stdout.readline()
            if not line:
                raise ArmDied(self._child.wait(), self._tail())
            if line.startswith(b"{"):  # vLLM prints as well
                answer = json.loads(line)
                if "error" in answer:
                    raise EngineFailed(answer["error"])
                return answer["result"]

    def _tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-3000:]


class Child:
    """The engine's end."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from vllm import LLM

        fixed = {"skip_tokenizer_init": True, "enable_lora": True, "disable_log_stats": True}
        self._llm = LLM(**{"enforce_eager": True, "max_model_len": 256, **fixed, **settings})
        self._adapters: dict[str, Any] = {}

    def name(self, name: str, path: str, number: int, reload: bool = False) -> None:
        """Let requests use an adapter; it is not loaded before the first of them."""
        from vllm.lora.request import LoRARequest

        self._adapters[name] = LoRARequest(name, number, path, load_inplace=reload)

    def load(self, name: str) -> bool:
        """Load it now."""
        return bool(self._llm.llm_engine.add_lora(self._adapters[name]))

    def pin(self, name: str) -> bool:
        """Pin it."""
        return bool(self._llm.llm_engine.pin_lora(self._adapters[name].lora_int_id))

    def listed(self) -> list[int]:
        """Ids of the adapters in memory."""
        return sorted(self._llm.llm_engine.list_loras())

    def call(self, method: str) -> Any:
        """A method of every worker."""
        return self._llm.collective_rpc(method)

    def compile_mode(self) -> str:
        """Name of the compile mode that the engine really has."""
        return str(self._llm.llm_engine.vllm_config.compilation_config.mode.name)

    def generate(
        self, rows: list[tuple[list[int], str | None]], max_tokens: int = 8, logprobs: int = 0
    ) -> list[dict[str, Any]]:
        """Greedy answers of a fixed length."""
        from vllm import SamplingParams

        parameters = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=logprobs
        )
        outputs = self._llm.generate(
            [{"prompt_token_ids": tokens} for tokens, _ in rows],
            parameters,
            lora_request=[self._adapters[name] if name else None for _, name in rows],
            use_tqdm=False,
        )
        return [_shown(output.outputs[0]) for output in outputs]


def _shown(completion: Any) -> dict[str, Any]:
    places = zip(completion.token_ids, completion.logprobs or [], strict=False)
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [place[token].logprob for token, place in places],
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def main() -> None:
    """The child: one line of JSON in, one out."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever is printed goes to the log
    child = Child(json.loads(sys.argv[1]))
    print(json.dumps({"result": "started"}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = getattr(child, request.pop("what"))(**request)
            print(json.dumps({"result": result}), file=answers)
        except Exception as error:  # told to the test, which knows what it expects
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers)


if __name__ in ("__main__", "__mp_main__"):  # the engine's own processes as well
    collect_seldom()

if __name__ == "__main__":
    main()
