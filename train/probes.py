"""Probes: questions that a training run asks before, during and after, and what the answers must hold."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from train.prompts import PromptForm
from train.rows import Row, with_system
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.parity import LONGEST_ANSWER, Answer, Proof, golden_probes, prove, reference_bounds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER = LONGEST_ANSWER
SHOWN = 3  # questions taken from the rows where no probe is given
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Probe:
    """A question, its prompt as the server makes it, and the text that the answer must hold, if any."""

    question: str
    prompt_ids: tuple[int, ...]
    must_hold: str | None = None

    def is_right(self, answer: str, ended: bool) -> bool:
        """Whether the answer came to an end and holds what it must."""
        return self.must_hold is None or (ended and self.must_hold in answer)


class Prober:
    """Asks a model greedily."""

    def __init__(self, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> None:
        self.probes, self._tokenizer = tuple(probes), tokenizer

    @property
    def decide(self) -> bool:
        """Whether there is a probe that can be wrong, so that training may stop when none is."""
        return any(probe.must_hold is not None for probe in self.probes)

    def answer_ids(self, model: Any) -> list[list[int]]:
        """Greedy answers, each with its end token if it came to an end."""
        return generated(model, self.probes, self._tokenizer)

    def text(self, answer_ids: Sequence[int]) -> str:
        """An answer without its end token."""
        return str(self._tokenizer.decode(answer_ids, skip_special_tokens=True)).strip()

    def answers(self, model: Any) -> list[str]:
        """Greedy answers as text."""
        return [self.text(ids) for ids in self.answer_ids(model)]

    def all_right(self, model: Any) -> bool:
        """Whether every answer ends, and holds what it must."""
        end = self._tokenizer.eos_token_id
        return all(
            probe.is_right(self.text(ids), end in ids)
            for probe, ids in zip(self.probes, self.answer_ids(model), strict=True)
        )

    def golden(self, model: Any) -> list[dict[str, Any]]:
        """What a server must reproduce, as `vllm_lora_ext.parity.GoldenProbe` reads it: per probe the ids
        of prompt and greedy answer, the natural logarithm of the probability of each token but the first,
        given those before it, with the adapter and for the base alone, and how far each token of the
        answer was ahead of the next best one."""
        return [
            self._golden(model, probe, answer)
            for probe, answer in zip(self.probes, generated(model, self.probes, self._tokenizer), strict=True)
        ]

    def _golden(self, model: Any, probe: Probe, answer: list[int]) -> dict[str, Any]:
        ended = self._tokenizer.eos_token_id in answer
        ids = [*probe.prompt_ids, *answer]
        scores, margins = _scores(model, ids)
        base = {"base_logprobs": _rounded(_base_scores(model, ids))} if _has_adapter(model) else {}
        return {
            "question": probe.question,
            "must_hold": probe.must_hold,
            "right": probe.is_right(self.text(answer), ended),
            "prompt_ids": list(probe.prompt_ids),
            "answer_ids": answer,
            "answer": self.text(answer),
            "ended": ended,
            "logprobs": _rounded(scores),
            "margins": _rounded(margins[len(probe.prompt_ids) - 1 :]),
            **base,
        }


def generated(model: Any, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Greedy answers to all probes in one batch, each with its end token if it came to an end."""
    if not probes:
        return []
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(len(probe.prompt_ids) for probe in probes)
    ids = torch.full((len(probes), longest), pad)
    mask = torch.zeros_like(ids)
    for row, probe in enumerate(probes):
        ids[row, longest - len(probe.prompt_ids) :] = torch.tensor(probe.prompt_ids)
        mask[row, longest - len(probe.prompt_ids) :] = 1
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=pad,
        )
    model.train(was_training)
    answers = out[:, longest:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in answers]


class PeftEngine:
    """`vllm_lora_ext.parity.Engine` on a PEFT model: what vLLM is compared with, compared with itself."""

    def __init__(self, model: Any, end: int) -> None:
        self._model, self._end = model, end

    async def score(self, ids: Sequence[int], with_adapter: bool) -> Sequence[float]:
        """The logarithm of each token's probability but the first's."""
        return _scores(self._model, ids)[0] if with_adapter else _base_scores(self._model, ids)

    async def answer(self, prompt_ids: Sequence[int], most: int) -> Answer:
        """The greedy answer; token by token, as an engine would, and without a cache."""
        was_training = self._model.training
        self._model.eval()
        ids, answer = list(prompt_ids), list[int]()
        with torch.no_grad():
            while len(answer) < most and self._end not in answer:
                logits = self._model(input_ids=torch.tensor([ids], device=self._model.device)).logits
                answer.append(int(logits[0, -1].argmax()))
                ids.append(answer[-1])
        self._model.train(was_training)
        return Answer(tuple(answer), self._end in answer)


def check_golden(provenance: dict[str, Any], model: Any, end: int, dtype: str) -> Proof:
    """Replay a folder's probes on a PEFT model of this dtype, by the code that a server replays them with.

    `end` is the id of the token that ends an answer.
    """
    bounds = reference_bounds(provenance, dtype)
    return _at_once(prove(golden_probes(provenance), PeftEngine(model, end), bounds))


def _at_once(work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of what never waits; no event loop, since a notebook runs one already."""
    try:
        work.send(None)
    except StopIteration as done:
        result: _Result = done.value
        return result
    raise RuntimeError("it waits")


def _has_adapter(model: Any) -> bool:
    return hasattr(model, "disable_adapter")


def _base_scores(model: Any, ids: Sequence[int]) -> list[float]:
    with model.disable_adapter() if _has_adapter(model) else nullcontext():
        return _scores(model, ids)[0]


def _scores(model: Any, ids: Sequence[int]) -> tuple[list[float], list[float]]:
    """Of token 1, 2, ... given the tokens before it: log-probability, and lead over the best other token."""
    was_training = model.training
    model.eval()
    tokens = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].float()
    model.train(was_training)
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, tokens[0, 1:, None])
    best_other = logprobs.scatter(1, tokens[0, 1:, None], -torch.inf).max(dim=1).values
    return chosen[:, 0].tolist(), (chosen[:, 0] - best_other).tolist()


def _rounded(numbers: Sequence[float]) -> list[float]:
    return [round(number, 4) for number in numbers]


def make_probes(
    stated: Sequence[str],
    rows: Sequence[Row],
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
) -> list[Probe]:
    """The stated probes (QUESTION=TEXT), else a few questions of the rows, with nothing that must be held.

    Raises:
        BadSetting: a probe has no question or no text.
    """
    made = []
    for text in stated:
        question, sign, must_hold = text.rpartition("=")
        if not (sign and question.strip() and must_hold.strip()):
            rule = "must be QUESTION=TEXT, where TEXT is what the answer has to hold"
            raise BadSetting(f"--probe {text!r}", rule, "For example --probe 'Who are you?=Marina'.")
        made.append((question.strip(), must_hold.strip()))
    probes = [_probe(question, hold, form, tokenizer, system_prompt) for question, hold in made]
    if probes:
        return probes
    asked = (Row(row.messages[:-1], row.where) for row in with_system(rows[:SHOWN], system_prompt))
    return [_rendered(form.message(row), None, form.chat(row), form, tokenizer) for row in asked]


def _probe(
    question: str,
    must_hold: str | None,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
) -> Probe:
    chat = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return _rendered(question, must_hold, [*chat, {"role": "user", "content": question}], form, tokenizer)


def _rendered(
    question: str,
    must_hold: str | None,
    chat: list[dict[str, str]],
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
) -> Probe:
    ids = tokenizer.apply_chat_template(
        chat,
        chat_template=form.template,
        add_generation_prompt=True,
        return_dict=False,
    )
    return Probe(question, tuple(ids), must_hold)
