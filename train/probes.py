"""Probes: questions that a training run asks before, during and after, and what the answers must hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.prompts import PromptForm
from train.rows import Row, with_system
from vllm_lora_ext.errors import BadSetting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER = 96  # tokens
SHOWN = 3  # questions taken from the rows where no probe is given


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
    """Asks a model greedily, all probes in one batch."""

    def __init__(self, probes: Sequence[Probe], tokenizer: PreTrainedTokenizerBase) -> None:
        self.probes, self._tokenizer = tuple(probes), tokenizer

    @property
    def decide(self) -> bool:
        """Whether there is a probe that can be wrong, so that training may stop when none is."""
        return any(probe.must_hold is not None for probe in self.probes)

    def answer_ids(self, model: Any) -> list[list[int]]:
        """Greedy answers, each with its end token if it came to an end."""
        if not self.probes:
            return []
        end = self._tokenizer.eos_token_id
        pad = end if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
        longest = max(len(probe.prompt_ids) for probe in self.probes)
        ids = torch.full((len(self.probes), longest), pad)
        mask = torch.zeros_like(ids)
        for row, probe in enumerate(self.probes):
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
        """What a server must reproduce: per probe the ids of prompt and greedy answer, and the natural
        logarithm of the probability of each token but the first, given those before it."""
        return [
            {
                "question": probe.question,
                "must_hold": probe.must_hold,
                "right": probe.is_right(self.text(answer), self._tokenizer.eos_token_id in answer),
                "prompt_ids": list(probe.prompt_ids),
                "answer_ids": answer,
                "answer": self.text(answer),
                "logprobs": _logprobs(model, [*probe.prompt_ids, *answer]),
            }
            for probe, answer in zip(self.probes, self.answer_ids(model), strict=True)
        ]


def _logprobs(model: Any, ids: Sequence[int]) -> list[float]:
    """Of token 1, 2, ... given the tokens before it; rounded to 4 places."""
    was_training = model.training
    model.eval()
    tokens = torch.tensor([ids], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[0, :-1].float()
    model.train(was_training)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])[:, 0]
    return [round(value, 4) for value in chosen.tolist()]


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
