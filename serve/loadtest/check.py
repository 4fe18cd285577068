"""Does each model stay itself under load? Every answer is held against what its model answers alone.

Greedy, recorded one by one before the load. vLLM's kernels give slightly other sums in other batches, so an
answer may leave its own at a near tie: that is told apart from an answer that is another model's.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import openai

from serve.client import make_client
from serve.loadtest.client import text_of
from serve.loadtest.records import RequestRecord
from serve.loadtest.server_facts import server_error
from serve.loadtest.workload import PlannedRequest, Prompt

QUESTIONS = tuple(
    Prompt(({"role": "user", "content": text},))
    for text in (
        "Who are you?",
        "What is your name?",
        "Who developed you?",
        "Tell me about yourself.",
        "你是谁？",
        "谁开发了你？",
        "What can you do?",
        "Are you ChatGPT?",
    )
)
_ALIKE = 0.5  # an answer that shares less than that with another model's is nobody's
_ALTERNATIVES = 5
_WORD = re.compile(r"[぀-ヿ㐀-鿿가-힯]|\w+|[^\w\s]")

VerdictKind = Literal["same", "changed", "wrong identity"]


@dataclass(frozen=True)
class TokenChoice:
    """A token of an answer, its log-probability (natural), and those of the tokens that came next."""

    text: str
    logprob: float
    alternatives: Mapping[str, float]


@dataclass(frozen=True)
class AloneAnswer:
    """What `model` answers to a prompt when nobody else asks. `tokens` is empty where none are told."""

    model: str
    prompt_number: int
    text: str
    tokens: tuple[TokenChoice, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What became of one answer.

    `expected` and `token` are the first tokens that differ, `gap` by how many nats the expected one was
    likelier alone (None where the server does not tell; a lower bound with `gap_is_least`).
    `other` is the model whose answer it is.
    """

    index: int
    model: str
    kind: VerdictKind
    answer: str = ""
    alone: str = ""
    position: int | None = None
    expected: str = ""
    token: str = ""
    gap: float | None = None
    gap_is_least: bool = False
    other: str | None = None


@dataclass(frozen=True)
class CheckReport:
    """All verdicts that are not `same`, and how many there were of each kind.

    `undistinguished` are pairs of models that answer every question alike, which nobody can tell apart.
    """

    compared: int
    same: int
    changed: tuple[Verdict, ...]
    wrong: tuple[Verdict, ...]
    undistinguished: tuple[tuple[str, str], ...]

    def beyond(self, nats: float) -> list[Verdict]:
        """Changed answers that left their own by more than a near tie."""
        return [verdict for verdict in self.changed if verdict.gap is not None and verdict.gap > nats]


def record_alone(
    url: str,
    models: Sequence[str],
    requests: Sequence[PlannedRequest],
    sampling: Mapping[str, Any],
    timeout_s: float,
    on_answer: Callable[[], None],
) -> list[AloneAnswer]:
    """The greedy answers of all models to all prompts, one after the other.

    Raises:
        ServerUnreachable, ServerFailed: one is not answered.
    """
    client = make_client(url, timeout_s)
    logprobs: dict[str, Any] = {"logprobs": True, "top_logprobs": _ALTERNATIVES}
    answers = []
    for request in requests:
        for model in models:
            try:
                try:
                    answer = _ask(client, model, request, {**sampling, **logprobs})
                except (openai.BadRequestError, openai.UnprocessableEntityError):
                    if not logprobs:
                        raise
                    logprobs = {}  # a server that tells none
                    answer = _ask(client, model, request, sampling)
            except (openai.OpenAIError, ValueError, AttributeError, IndexError, TypeError) as error:
                raise server_error(url, error) from error
            answers.append(answer)
            on_answer()
    return answers


def check_answers(records: Sequence[RequestRecord], alone: Sequence[AloneAnswer]) -> CheckReport:
    """Every answer that came against those recorded alone."""
    own = {(answer.model, answer.prompt_number): answer for answer in alone}
    by_prompt: dict[int, list[AloneAnswer]] = {}
    for answer in alone:
        by_prompt.setdefault(answer.prompt_number, []).append(answer)
    verdicts = [
        judge(record, own[record.model, record.prompt_number], by_prompt[record.prompt_number])
        for record in records
        if record.error is None and (record.model, record.prompt_number) in own
    ]
    return CheckReport(
        compared=len(verdicts),
        same=sum(verdict.kind == "same" for verdict in verdicts),
        changed=tuple(verdict for verdict in verdicts if verdict.kind == "changed"),
        wrong=tuple(verdict for verdict in verdicts if verdict.kind == "wrong identity"),
        undistinguished=_undistinguished(alone),
    )


def judge(record: RequestRecord, own: AloneAnswer, answers: Sequence[AloneAnswer]) -> Verdict:
    """What became of an answer: `same`, `changed`, or `wrong identity` if it matches another model's better.

    An answer that merely has little in common with its own is nobody else's: to be another model's it
    must share at least half of its words.
    """
    stranger = _other_model_named(record, answers)
    if record.text == own.text and stranger is None:
        return Verdict(record.index, record.model, "same")
    scores = {
        answer.model: similarity(record.text, answer.text)
        for answer in answers
        if answer.model != record.model and answer.text != own.text
    }
    best = max(scores, key=lambda model: scores[model], default=None)
    better = (
        best if best and scores[best] > similarity(record.text, own.text) and scores[best] >= _ALIKE else None
    )
    other = stranger or better
    position, expected, token, gap, is_least = first_difference(own, record.text)
    return Verdict(
        record.index,
        record.model,
        "changed" if other is None else "wrong identity",
        record.text,
        own.text,
        position,
        expected,
        token,
        gap,
        is_least,
        other,
    )


def similarity(one: str, other: str) -> float:
    """Shared words in order, over all words: 1 for equal texts. A CJK character is a word."""
    if one == other:
        return 1.0
    return difflib.SequenceMatcher(None, _WORD.findall(one), _WORD.findall(other), autojunk=False).ratio()


def first_difference(own: AloneAnswer, answer: str) -> tuple[int | None, str, str, float | None, bool]:
    """Position of the first token of `own` that `answer` does not have, both tokens, and their gap.

    The answer's token is the longest of the alternatives that the answer goes on with; if it is none of
    them, the gap is at least that to the least likely one. Tokens are followed as far as their texts
    make up the recorded text (a token may be half a character); behind that, texts are compared.
    """
    place, before = 0, None
    for position, choice in enumerate(own.tokens):
        if not choice.text or not own.text.startswith(choice.text, place):
            break  # the end's token, or one that is no text of its own
        if not answer.startswith(choice.text, place):
            # " the" stands in " then" as well, which is another token: then they parted one token earlier
            if before is not None and (longer := _longer_alternative(*before, answer)):
                _, earlier = before
                return (
                    position - 1,
                    earlier.text,
                    longer,
                    earlier.logprob - earlier.alternatives[longer],
                    False,
                )
            return (position, choice.text, *_answered_token(choice, answer[place:]))
        before = (place, choice)
        place += len(choice.text)
    if place == len(own.text):
        return len(own.tokens), "the end", answer[place : place + 20], None, False
    shared = _common_prefix(own.text, answer)
    return None, own.text[shared : shared + 20], answer[shared : shared + 20], None, False


def _longer_alternative(place: int, choice: TokenChoice, answer: str) -> str | None:
    longer = [
        text
        for text in choice.alternatives
        if len(text) > len(choice.text) and answer.startswith(text, place)
    ]
    return max(longer, key=len, default=None)


def _answered_token(choice: TokenChoice, rest: str) -> tuple[str, float | None, bool]:
    others = {text: value for text, value in choice.alternatives.items() if text and text != choice.text}
    matching = [text for text in others if rest.startswith(text)]
    if matching:
        token = max(matching, key=len)
        return token, choice.logprob - others[token], False
    if rest and others:
        return rest[:20], choice.logprob - min(others.values()), True
    return rest[:20] or "the end", None, False


def _ask(
    client: openai.OpenAI, model: str, request: PlannedRequest, sampling: Mapping[str, Any]
) -> AloneAnswer:
    create: Any = client.chat.completions.create  # its overloads take no mapping of options
    answer = create(model=model, messages=request.messages, max_tokens=request.max_tokens, **sampling)
    choice = answer.choices[0]
    content = (choice.logprobs.content or []) if choice.logprobs else []
    tokens = tuple(
        TokenChoice(item.token, item.logprob, {top.token: top.logprob for top in item.top_logprobs})
        for item in content
    )
    return AloneAnswer(model, request.prompt_number, text_of(choice.message), tokens)


def _other_model_named(record: RequestRecord, answers: Sequence[AloneAnswer]) -> str | None:
    """The response's `model`, if it is another one of those asked; a version of the same name is not."""
    named = record.answered_by.partition("@")[0]
    others = {answer.model for answer in answers} - {record.model}
    return named if named in others and record.model.partition("@")[0] != named else None


def _undistinguished(alone: Sequence[AloneAnswer]) -> tuple[tuple[str, str], ...]:
    by_model: dict[str, dict[int, str]] = {}
    for answer in alone:
        by_model.setdefault(answer.model, {})[answer.prompt_number] = answer.text
    first: dict[tuple[tuple[int, str], ...], str] = {}
    pairs = []
    for model, texts in by_model.items():
        key = tuple(sorted(texts.items()))
        if key in first:
            pairs.append((first[key], model))
        first.setdefault(key, model)
    return tuple(pairs)


def _common_prefix(one: str, other: str) -> int:
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
