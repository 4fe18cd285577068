"""Passes over the base that several identities share: to learn, to be measured, and to answer probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.joint.layout import Layout, laid_out
from train.probes import Probe, generated
from train.prompts import IGNORED
from train.trainer import Measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_Asked = Mapping[str, Any]
_Row = tuple[torch.Tensor, torch.Tensor]  # ids, labels
# On a CPU with bfloat16, oneDNN's products take 8 % longer where the number of rows is no multiple of this
# (measured from 516 to 704 rows; `docs/decisions.md`). Below the second number the filling weighs more.
_WHOLE_TOKENS, _WORTH_FILLING = 12, 256


@dataclass(frozen=True)
class Batch:
    """Rows of one identity, right-padded: `ids` and `labels` (rows, longest).

    With `tokens` they are learned from: the gradient is that of the summed loss divided by it. `seed` is
    that of dropout.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    tokens: int | None = None
    seed: int | None = None

    @property
    def lengths(self) -> list[int]:
        """Of each row up to its last trained token: nothing behind it matters."""
        places = torch.arange(1, self.labels.shape[1] + 1, device=self.labels.device)
        return [int(length) for length in ((self.labels != IGNORED) * places).amax(dim=1)]


@dataclass(frozen=True)
class Questions:
    """Probes that one identity is to answer greedily."""

    probes: tuple[Probe, ...]


class Passes:
    """What `train.joint.lanes.run_together` asks: one pass for all that wants the same.

    `most_tokens` bounds a pass, and so the memory of its activations; what is more goes through in several.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> None:
        self._model, self._tokenizer, self._most_tokens = model, tokenizer, most_tokens
        self._has_gradients = False

    def answer(self, asked: _Asked) -> dict[str, Any]:
        """Name -> `Measured` for a `Batch`, ids of answers for `Questions`."""
        batches = {name: what for name, what in asked.items() if isinstance(what, Batch)}
        learned = {name: batch for name, batch in batches.items() if batch.tokens is not None}
        looked_at = {name: batch for name, batch in batches.items() if batch.tokens is None}
        questions = {name: what.probes for name, what in asked.items() if isinstance(what, Questions)}
        answers: dict[str, Any] = {}
        for part in self._parts(learned):
            answers |= self._pass_of_all(part)
        for part in self._parts(looked_at):
            with torch.no_grad():
                answers |= self._pass_of_all(part)
        if questions:
            answers |= self._answers(questions)
        return answers

    def _parts(self, batches: Mapping[str, Batch]) -> Iterator[dict[str, Batch]]:
        """In their order, as many identities together as have room; one alone always has."""
        part: dict[str, Batch] = {}
        tokens = 0
        for name, batch in batches.items():
            more = sum(batch.lengths)
            if part and tokens + more > self._most_tokens:
                yield part
                part, tokens = {}, 0
            part[name] = batch
            tokens += more
        if part:
            yield part

    def _pass_of_all(self, batches: Mapping[str, Batch]) -> dict[str, Measured | Exception]:
        """One pass, or if that fails, one for each, so that what is wrong with one stays with it."""
        self._has_gradients = False
        try:
            return {**self._pass(batches)}
        except Exception as error:  # whatever torch makes of bad numbers, or of too little memory
            if len(batches) == 1 or self._has_gradients:  # some may be there, and would count twice
                return dict.fromkeys(batches, error)
        answers: dict[str, Measured | Exception] = {}
        for name, batch in batches.items():
            answers |= self._pass_of_all({name: batch})
        return answers

    def _pass(self, batches: Mapping[str, Batch]) -> dict[str, Measured]:
        rows = _filled_up([row for batch in batches.values() for row in _trained_rows(batch)])
        device = self._model.device
        counts = {name: sum(length > 0 for length in batch.lengths) for name, batch in batches.items()}
        seeds = {name: batch.seed for name, batch in batches.items() if batch.seed is not None}
        layout = Layout(counts, [len(ids) for ids, _ in rows], seeds, device)
        with laid_out(layout):
            outputs = self._model(
                input_ids=torch.cat([ids for ids, _ in rows])[None].to(device),
                position_ids=torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None].to(device),
                labels=torch.cat([labels for _, labels in rows])[None].to(device),
            )
            trained = [_trained_tokens(batch) for batch in batches.values()]
            losses, rights = outputs["losses"].split(trained), outputs["rights"].split(trained)
            if torch.is_grad_enabled():
                shares = [
                    loss.new_full((len(loss),), 1 / (batch.tokens or 1))
                    for loss, batch in zip(losses, batches.values(), strict=True)
                ]
                self._has_gradients = True
                outputs["losses"].backward(torch.cat(shares))
        return {
            name: Measured(loss.detach().sum(), int(right.sum()), len(loss))
            for name, loss, right in zip(batches, losses, rights, strict=True)
        }

    def _answers(self, questions: Mapping[str, Sequence[Probe]]) -> dict[str, list[list[int]]]:
        counts = {name: len(probes) for name, probes in questions.items()}
        every = [probe for probes in questions.values() for probe in probes]
        with laid_out(Layout(counts, None, device=self._model.device)):
            answers = iter(generated(self._model, every, self._tokenizer))
        return {name: [next(answers) for _ in range(count)] for name, count in counts.items()}


def _filled_up(rows: list[_Row]) -> list[_Row]:
    """The last row longer by tokens in which nothing is trained, so that all together are a good number."""
    total = sum(len(ids) for ids, _ in rows)
    more = -total % _WHOLE_TOKENS if total >= _WORTH_FILLING else 0
    if not more:
        return rows
    ids, labels = rows[-1]
    longer = torch.cat([ids, ids[-1:].expand(more)]), torch.cat([labels, labels.new_full((more,), IGNORED)])
    return [*rows[:-1], longer]


def _trained_rows(batch: Batch) -> Iterator[_Row]:
    """ids and labels of each row without its end, in which nothing is trained; nothing predicts the first
    token, and behind another row something seems to."""
    for ids, labels, length in zip(batch.ids, batch.labels, batch.lengths, strict=True):
        if length:
            trained = labels[:length].clone()
            trained[0] = IGNORED
            yield ids[:length], trained


def _trained_tokens(batch: Batch) -> int:
    return int((batch.labels[:, 1:] != IGNORED).sum())
