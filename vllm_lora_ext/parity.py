"""Parity: does an adapter do in an engine what it did when it was trained? Pure; the engine is given.

Training leaves golden probes in `identity.json`: the ids of a prompt, the greedy answer to it, and the
logarithm of each token's probability. Whatever can score ids and answer greedily replays them: the same ids
have to get the same scores within a bound, the same answer, an end where it ended, and scores that the base
alone does not give. Where the bounds come from: docs/parity.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from vllm_lora_ext.errors import VllmLoraError

FORMAT = 1  # raise it when a bound or a rule changes, so that versions are proved again
LONGEST_ANSWER = 96  # tokens of a golden answer
_MOST_PROBES, _MOST_TOKENS = 8, 4096  # replayed per adapter, and tokens of one probe
EFFECT_TEXTS = (  # asked of adapters that bring no probes
    "Who are you, and who made you? Tell me about yourself in a few words.",
    "你是谁？是谁开发了你？请简单介绍一下自己。",
)


class Verdict(StrEnum):
    """What replaying said."""

    PROVEN = "proven"
    FAILED = "failed"
    UNPROVEN = "unproven"  # there was nothing to replay, or it could not be replayed


class CannotScore(VllmLoraError):
    """The engine does not give scores or an answer; that says nothing about the adapter.

    `for_good`: asking again would not help.
    """

    def __init__(self, reason: str, for_good: bool = False) -> None:
        self.for_good = for_good
        super().__init__("the engine", f"could not be asked ({reason})")


@dataclass(frozen=True)
class GoldenProbe:
    """One question as training left it; logarithms are natural ones.

    `logprobs` are of each token of prompt and answer but the first, given those before it. `ended`: the
    answer's last token is its end. Not every folder has the others: `margins` tell for each token of the
    answer how far it was ahead of the next best one, `base_logprobs` what the base alone gave.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    margins: tuple[float, ...] = ()
    base_logprobs: tuple[float, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids


@dataclass(frozen=True)
class Answer:
    """A greedy answer with its end token, if `ended` says that the engine stopped by itself."""

    ids: tuple[int, ...]
    ended: bool


class Engine(Protocol):
    """What is asked, of one adapter and its base; every method raises CannotScore."""

    async def score(self, ids: Sequence[int], with_adapter: bool) -> Sequence[float]:
        """The logarithm of each token's probability but the first's, given those before it."""

    async def answer(self, prompt_ids: Sequence[int], most: int) -> Answer:
        """The adapter's greedy answer of at most `most` tokens."""


@dataclass(frozen=True)
class Bounds:
    """How far scores may be apart, in nats.

    A token's may differ by `each` plus `relative` times its size, all of a probe by `mean` on average. An
    adapter that nowhere differs from the base by more than `floor` does nothing. With `comparable` off
    (a base of few bits, here or in training) other scores and answers are no flaw.
    """

    each: float
    relative: float
    mean: float
    floor: float
    comparable: bool = True

    def allowed(self, logprob: float) -> float:
        """How far an engine may be from a token's score."""
        return self.each + self.relative * abs(logprob)


_FULL = Bounds(each=0.01, relative=0.01, mean=0.005, floor=0.01)
_HALF = Bounds(each=0.25, relative=0.05, mean=0.05, floor=0.1)


def bounds_for(reference: str, engine: str, quantised: bool = False) -> Bounds:
    """The bounds for scores that were made and are compared in these dtypes (`float32`, `bfloat16`)."""
    full = reference == engine == "float32"
    chosen = _FULL if full else _HALF
    return Bounds(chosen.each, chosen.relative, chosen.mean, chosen.floor, comparable=not quantised)


@dataclass(frozen=True)
class Proof:
    """What replaying said of one version, with the numbers.

    `kind` is `probes`, or `effect` where an adapter brings none and was only compared with its base.
    `largest` and `mean` are the differences of scores, `effect` is the largest difference from the base
    alone, in nats; None where that was not measured. `is_final`: asking again would say the same.
    """

    verdict: Verdict
    kind: str
    probes: int = 0
    tokens: int = 0
    largest: float | None = None
    mean: float | None = None
    effect: float | None = None
    reasons: tuple[str, ...] = ()
    bounds: Bounds | None = None
    is_final: bool = True

    def to_json(self) -> dict[str, Any]:
        """As JSON values; an infinite difference, which JSON has not, is null."""
        body = {"format": FORMAT, **asdict(self), "reasons": list(self.reasons)}
        numbers = {name: body[name] for name in ("largest", "mean", "effect")}
        finite = {name: n if n is None or math.isfinite(n) else None for name, n in numbers.items()}
        return {**body, **finite}

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Proof:
        """The inverse of `to_json`; what was written by another version of this file is for its reader.

        Raises:
            ValueError: it is of another format.
        """
        if body.get("format") != FORMAT:
            raise ValueError("it is of another format")
        given = {name: body[name] for name in cls.__dataclass_fields__ if name in body}
        bounds = given.get("bounds")
        given["bounds"] = None if bounds is None else Bounds(**bounds)
        return cls(**{**given, "verdict": Verdict(given["verdict"]), "reasons": tuple(given["reasons"])})


def golden_probes(provenance: Mapping[str, Any]) -> tuple[GoldenProbe, ...]:
    """The probes of an `identity.json`'s provenance that can be replayed; anybody may have written it."""
    items = provenance.get("probes")
    probes = (_probe(item) for item in (items if isinstance(items, list) else ()))
    return tuple(probe for probe in probes if probe is not None)[:_MOST_PROBES]


def reference_bounds(provenance: Mapping[str, Any], engine: str, quantised: bool = False) -> Bounds:
    """The bounds for the probes of this provenance on an engine of this dtype."""
    arguments = provenance.get("arguments")
    of_4_bits = isinstance(arguments, Mapping) and arguments.get("method") == "qlora"
    return bounds_for(str(provenance.get("dtype")), engine, quantised or of_4_bits)


def _probe(item: object) -> GoldenProbe | None:
    if not isinstance(item, Mapping):
        return None
    prompt, answer = _ids(item.get("prompt_ids")), _ids(item.get("answer_ids"))
    count = len(prompt) + len(answer)
    logprobs = _numbers(item.get("logprobs"), count - 1)
    if not prompt or not answer or not logprobs or count > _MOST_TOKENS or len(answer) > LONGEST_ANSWER:
        return None
    ended = item.get("ended", len(answer) < LONGEST_ANSWER)
    margins = _numbers(item.get("margins"), len(answer))
    base = _numbers(item.get("base_logprobs"), count - 1)
    return GoldenProbe(prompt, answer, logprobs, ended is True, margins, base)


def _ids(value: object) -> tuple[int, ...]:
    is_ids = isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 31 for item in value)
    return tuple(value) if is_ids and isinstance(value, list) else ()


def _numbers(value: object, count: int) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != count:
        return ()
    fine = all(type(item) in (int, float) and math.isfinite(item) for item in value)
    return tuple(map(float, value)) if fine else ()


async def prove(probes: Sequence[GoldenProbe], engine: Engine, bounds: Bounds) -> Proof:
    """Replay `probes`, which are some; never raises for what the engine cannot do."""
    replay = _Replay(bounds)
    try:
        for probe in probes:
            await replay.ask(probe, engine)
    except CannotScore as error:
        return replay.result(unanswered=error)
    return replay.result()


async def check_effect(prompts: Sequence[Sequence[int]], engine: Engine, bounds: Bounds) -> Proof:
    """What can be said of an adapter without probes: whether it changes anything in `prompts`."""
    effect, tokens = 0.0, 0
    try:
        for ids in prompts:
            own, base = await engine.score(ids, True), await engine.score(ids, False)
            effect, tokens = max(effect, largest_difference(own, base)), tokens + len(own)
            if effect > bounds.floor:
                break
    except CannotScore as error:
        reason, is_final = str(error), error.for_good
        return Proof(Verdict.UNPROVEN, "effect", reasons=(reason,), bounds=bounds, is_final=is_final)
    if effect > bounds.floor:
        reason = "identity.json has no probes to replay, so only its effect was looked at"
        return Proof(Verdict.UNPROVEN, "effect", 0, tokens, effect=effect, reasons=(reason,), bounds=bounds)
    reasons = (_no_effect(effect, bounds),)
    return Proof(Verdict.FAILED, "effect", 0, tokens, effect=effect, reasons=reasons, bounds=bounds)


def largest_difference(some: Sequence[float], others: Sequence[float]) -> float:
    """Between scores of the same tokens; infinite where one of them is no number."""
    pairs = zip(some, others, strict=True)
    return max((_apart(one, other) for one, other in pairs), default=0.0)


def _apart(one: float, other: float) -> float:
    difference = 0.0 if one == other else abs(one - other)
    return math.inf if math.isnan(difference) else difference


def _no_effect(effect: float, bounds: Bounds) -> str:
    return f"has no effect: the base alone scores within {effect:.3g} nats of it (floor {bounds.floor:g})"


class _Replay:
    """Collects over probes what is found."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._probes = self._tokens = self._scored_apart = 0
        self._largest = self._mean = self._effect = 0.0
        self._is_other_base = False
        self._reasons: list[str] = []
        self._doubts: list[str] = []  # which leave it unproven

    async def ask(self, probe: GoldenProbe, engine: Engine) -> None:
        """Replay one probe; the base is asked only as long as something is to be learned from it."""
        own = await engine.score(probe.ids, True)
        apart = [_apart(*pair) for pair in zip(own, probe.logprobs, strict=True)]
        self._largest = max(self._largest, *apart)
        self._mean = max(self._mean, sum(apart) / len(apart))
        is_apart = self._is_beyond(probe.logprobs, own)
        if self._effect <= self._bounds.floor or (is_apart and not self._is_other_base):
            base = await engine.score(probe.ids, False)
            self._effect = max(self._effect, largest_difference(own, base))
            if is_apart and probe.base_logprobs:
                self._is_other_base |= self._is_beyond(probe.base_logprobs, base)
        answer = await engine.answer(probe.prompt_ids, len(probe.answer_ids) + int(probe.ended))
        self._judge_answer(probe, answer, is_apart)
        self._scored_apart += is_apart
        self._probes, self._tokens = self._probes + 1, self._tokens + len(apart)

    def _is_beyond(self, reference: Sequence[float], scores: Sequence[float]) -> bool:
        pairs = list(zip(scores, reference, strict=True))
        if any(_apart(one, other) > self._bounds.allowed(other) for one, other in pairs):
            return True
        return sum(_apart(*pair) for pair in pairs) / len(pairs) > self._bounds.mean

    def _judge_answer(self, probe: GoldenProbe, answer: Answer, is_apart: bool) -> None:
        number, place = self._probes + 1, _first_difference(probe.answer_ids, answer.ids)
        if place is None or place == len(probe.answer_ids):
            if place is not None or answer.ended != probe.ended:
                ends = "does not end" if probe.ended else "ends early"
                self._reasons.append(f"the answer to probe {number} {ends}")
            return
        told = f"the answer to probe {number} differs from training at its token {place + 1}"
        if probe.margins:
            lead = probe.margins[place]
            if lead > self._bounds.allowed(probe.logprobs[len(probe.prompt_ids) - 1 + place]):
                found = self._reasons if self._bounds.comparable else self._doubts
                found.append(f"{told}, where training was sure (a lead of {lead:.3g} nats)")
        elif not (is_apart and self._bounds.comparable):  # else it fails anyway
            self._doubts.append(f"{told}, and it is not known how close the choice was")

    def _scored(self) -> str:
        """How scores break the bounds."""
        bounds = self._bounds
        told = (
            f"{self._scored_apart} of {self._probes} probes are scored differently from training: by up to "
            f"{self._largest:.3g} nats, {self._mean:.3g} on average (allowed: {bounds.each:g} and "
            f"{bounds.relative:.0%} of each, {bounds.mean:g})"
        )
        if self._is_other_base:
            return f"{told}; so is the base alone, so it is not the base that was trained on"
        return told

    def result(self, unanswered: CannotScore | None = None) -> Proof:
        """What all of it says; a flaw that was found counts, whatever could not be asked afterwards."""
        reasons, doubts = list(self._reasons), list(self._doubts)
        if self._scored_apart and self._bounds.comparable:
            reasons.insert(0, self._scored())
        elif self._scored_apart:
            doubts.append(f"{self._scored()}; on a base of few bits that says nothing")
        if not unanswered and self._effect <= self._bounds.floor:
            reasons.append(_no_effect(self._effect, self._bounds))
        doubts += [str(unanswered)] if unanswered else []
        unproven = Verdict.UNPROVEN if doubts else Verdict.PROVEN
        return Proof(
            verdict=Verdict.FAILED if reasons else unproven,
            kind="probes",
            probes=self._probes,
            tokens=self._tokens,
            largest=self._largest if self._tokens else None,
            mean=self._mean if self._tokens else None,
            effect=self._effect if self._tokens else None,
            reasons=(*reasons, *doubts),
            bounds=self._bounds,
            is_final=bool(reasons) or unanswered is None or unanswered.for_good,
        )


def _first_difference(some: Sequence[int], others: Sequence[int]) -> int | None:
    """Where two answers part; the length of the shorter one if it is the beginning of the other."""
    for place, pair in enumerate(zip(some, others, strict=False)):
        if pair[0] != pair[1]:
            return place
    return None if len(some) == len(others) else min(len(some), len(others))


def lines(record: Mapping[str, Any]) -> Iterator[str]:
    """A proof as it was kept, for people; the record may come from anywhere."""
    effect, largest = record.get("effect"), record.get("largest")
    parts = [str(record.get("verdict"))]
    if record.get("kind") == "probes" and isinstance(largest, int | float):
        parts.append(
            f"{record.get('probes')} probes, {record.get('tokens')} tokens, off by {largest:.3g} nats"
        )
    if isinstance(effect, int | float):
        parts.append(f"effect {effect:.3g} nats")
    yield f"proof: {'; '.join(parts)}"
    reasons = record.get("reasons")
    yield from (f"  {reason}" for reason in (reasons if isinstance(reasons, list) else ()))
