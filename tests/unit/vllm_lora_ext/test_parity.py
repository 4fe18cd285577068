"""The proof, with an engine made of tables: what passes, what fails, and what is only unproven."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from vllm_lora_ext.parity import (
    Answer,
    Bounds,
    CannotScore,
    GoldenProbe,
    Proof,
    Verdict,
    bounds_for,
    check_effect,
    golden_probes,
    lines,
    prove,
    reference_bounds,
)

BOUNDS = Bounds(each=0.1, relative=0.05, mean=0.05, floor=0.1)
END = 2
PROBE = GoldenProbe(
    prompt_ids=(10, 11, 12),
    answer_ids=(20, 21, END),
    logprobs=(-4.0, -3.0, -0.5, -0.1, -0.2),
    ended=True,
    margins=(1.5, 0.05, 3.0),
    base_logprobs=(-4.0, -3.0, -8.0, -9.0, -6.0),
)


@dataclass
class TableEngine:
    """An `Engine` that says what the reference says, unless it is told to differ.

    As the protocol wants: a score for each id but the first, an answer of `most` tokens at most, which
    `ended` only if it came to its end within them.
    """

    probe: GoldenProbe = PROBE
    off: Callable[[int], float] = lambda place: 0.0
    base_off: Callable[[int], float] = lambda place: 0.0
    base_is_adapter: bool = False
    answer_ids: tuple[int, ...] = (*PROBE.answer_ids,)
    ends: bool = True
    fails: str = ""
    for_good: bool = False
    asked: int = 0

    async def score(self, ids: Sequence[int], with_adapter: bool) -> list[float]:
        self._ask("score")
        assert tuple(ids) == self.probe.ids
        own = [score + self.off(place) for place, score in enumerate(self.probe.logprobs)]
        if with_adapter or self.base_is_adapter:
            return own
        base = self.probe.base_logprobs or [0.0] * len(own)
        return [score + self.base_off(place) for place, score in enumerate(base)]

    async def answer(self, prompt_ids: Sequence[int], most: int) -> Answer:
        self._ask("answer")
        assert tuple(prompt_ids) == self.probe.prompt_ids
        whole = self.answer_ids if self.ends else (*self.answer_ids, *[99] * most)
        return Answer(whole[:most], self.ends and len(whole) <= most)

    def _ask(self, what: str) -> None:
        self.asked += 1
        if self.fails == what:
            raise CannotScore("no", self.for_good)


def proof_of(engine: TableEngine, bounds: Bounds = BOUNDS, count: int = 1) -> Proof:
    return asyncio.run(prove([engine.probe] * count, engine, bounds))


def test_the_same_scores_and_answer_prove_it_with_the_numbers() -> None:
    engine = TableEngine(off=lambda place: 0.02)
    proof = proof_of(engine, count=3)
    assert proof.verdict is Verdict.PROVEN and proof.reasons == () and proof.is_final
    assert (proof.kind, proof.probes, proof.tokens) == ("probes", 3, 15)
    assert proof.largest == pytest.approx(0.02) and proof.mean == pytest.approx(0.02)
    assert proof.effect == pytest.approx(8.92)
    assert engine.asked == 7, "the base is asked once: then it is known that the adapter acts"


@pytest.mark.parametrize(
    ("off", "verdict"),
    [
        (lambda place: 0.11 if place == 4 else 0.0, Verdict.PROVEN),  # allowed: 0.1 + 5 % of 0.2
        (lambda place: 0.12 if place == 4 else 0.0, Verdict.FAILED),
        (lambda place: 0.24 if place == 0 else 0.0, Verdict.PROVEN),  # an unlikely token may differ by more
        (lambda place: 0.31 if place == 0 else 0.0, Verdict.FAILED),
        (lambda place: 0.06, Verdict.FAILED),  # each token is within its bound, all together are not
        (lambda place: -math.inf if place == 2 else 0.0, Verdict.FAILED),
        (lambda place: math.nan if place == 2 else 0.0, Verdict.FAILED),
    ],
)
def test_scores_may_differ_by_the_bound_and_by_no_more(off: Callable[[int], float], verdict: Verdict) -> None:
    proof = proof_of(TableEngine(off=off))
    assert proof.verdict is verdict
    if verdict is Verdict.FAILED:
        (reason,) = proof.reasons
        assert "1 of 1 probes are scored differently from training" in reason
        assert "not the base" not in reason
    assert json.loads(json.dumps(proof.to_json(), allow_nan=False))["verdict"] == verdict


def test_another_base_is_named_as_the_cause() -> None:
    engine = TableEngine(off=lambda place: 1.0, base_off=lambda place: 1.0)
    (reason,) = proof_of(engine).reasons
    assert "it is not the base that was trained on" in reason


def test_an_adapter_that_does_nothing_fails_even_if_training_saw_the_same() -> None:
    proof = proof_of(TableEngine(base_is_adapter=True))
    assert proof.verdict is Verdict.FAILED and proof.effect == 0.0
    assert "has no effect" in proof.reasons[0]


@pytest.mark.parametrize(
    ("answer", "ends", "verdict", "reason"),
    [
        ((20, 99, END), True, Verdict.PROVEN, None),  # token 2 was ahead by 0.05 only: rounding decides
        ((99, 21, END), True, Verdict.FAILED, "token 1, where training was sure (a lead of 1.5 nats)"),
        ((20, 21, END), False, Verdict.FAILED, "does not end"),  # the end token is none to this engine
        ((20, 21), True, Verdict.FAILED, "ends early|token 3"),
        ((20, 21, 3), True, Verdict.FAILED, "token 3, where training was sure (a lead of 3 nats)"),
    ],
)
def test_the_answer_is_the_same_where_training_was_sure(
    answer: tuple[int, ...], ends: bool, verdict: Verdict, reason: str | None
) -> None:
    proof = proof_of(TableEngine(answer_ids=answer, ends=ends))
    assert proof.verdict is verdict
    if reason is None:
        assert proof.reasons == ()
    else:
        assert len(proof.reasons) == 1 and any(part in proof.reasons[0] for part in reason.split("|"))


def test_an_answer_that_was_cut_off_may_not_end_before() -> None:
    cut = dataclasses.replace(PROBE, answer_ids=(20, 21, 22), ended=False)
    engine = TableEngine(probe=cut, answer_ids=(20, 21, 22), ends=False)
    assert proof_of(engine).verdict is Verdict.PROVEN
    (reason,) = proof_of(dataclasses.replace(engine, ends=True)).reasons
    assert reason == "the answer to probe 1 ends early"


def test_without_margins_another_answer_is_unproven_and_says_so() -> None:
    old = dataclasses.replace(PROBE, margins=())
    proof = proof_of(TableEngine(probe=old, answer_ids=(20, 99, END)))
    assert proof.verdict is Verdict.UNPROVEN and proof.is_final
    assert "differs from training at its token 2, and it is not known how close" in proof.reasons[0]


def test_on_a_base_of_few_bits_scores_are_no_flaw_but_no_effect_is() -> None:
    bounds = dataclasses.replace(BOUNDS, comparable=False)
    proof = proof_of(TableEngine(off=lambda place: 1.0, answer_ids=(99, 21, END)), bounds)
    assert proof.verdict is Verdict.UNPROVEN and len(proof.reasons) == 2
    assert proof_of(TableEngine(base_is_adapter=True), bounds).verdict is Verdict.FAILED


@pytest.mark.parametrize("fails", ["score", "answer"])
@pytest.mark.parametrize("for_good", [True, False])
def test_an_engine_that_cannot_be_asked_leaves_it_unproven(fails: str, for_good: bool) -> None:
    proof = proof_of(TableEngine(fails=fails, for_good=for_good))
    assert proof.verdict is Verdict.UNPROVEN and proof.is_final is for_good
    assert proof.reasons == ("the engine: could not be asked (no).",)
    effect = asyncio.run(check_effect([PROBE.ids], TableEngine(fails="score", for_good=for_good), BOUNDS))
    assert (effect.verdict, effect.kind, effect.is_final) == (Verdict.UNPROVEN, "effect", for_good)


def test_a_flaw_counts_whatever_cannot_be_asked_afterwards() -> None:
    class Ends(TableEngine):
        async def score(self, ids: Sequence[int], with_adapter: bool) -> list[float]:
            if self.asked > 2:
                raise CannotScore("it ended")
            return await super().score(ids, with_adapter)

    proof = proof_of(Ends(off=lambda place: 1.0), count=2)
    assert proof.verdict is Verdict.FAILED and proof.probes == 1 and len(proof.reasons) == 2


def test_without_probes_only_the_effect_is_looked_at_and_marked() -> None:
    proof = asyncio.run(check_effect([PROBE.ids] * 2, TableEngine(), BOUNDS))
    assert (proof.verdict, proof.kind, proof.probes) == (Verdict.UNPROVEN, "effect", 0)
    assert proof.effect == pytest.approx(8.9) and "no probes" in proof.reasons[0]
    dead = asyncio.run(check_effect([PROBE.ids], TableEngine(base_is_adapter=True), BOUNDS))
    assert dead.verdict is Verdict.FAILED and "no effect" in dead.reasons[0]


def item(**changes: Any) -> dict[str, Any]:
    body = {name: list(value) for name, value in dataclasses.asdict(PROBE).items() if name != "ended"}
    return {**body, "question": "?", "ended": True, **changes}


def test_what_training_stored_is_read() -> None:
    assert golden_probes({"probes": [item()]}) == (PROBE,)
    first = {
        name: value for name, value in item().items() if name in ("prompt_ids", "answer_ids", "logprobs")
    }
    (probe,) = golden_probes({"probes": [first]})
    assert (probe.ended, probe.margins, probe.base_logprobs) == (True, (), ()), "of before they were stored"
    assert len(golden_probes({"probes": [item()] * 50})) == 8, "an upload does not decide what is spent"


@pytest.mark.parametrize(
    "probes",
    [
        None,
        3,
        {},
        [None, 3, []],
        [item(prompt_ids=[])],
        [item(answer_ids=[])],
        [item(prompt_ids=[-1, 2, 3])],
        [item(prompt_ids=[True, 2, 3])],
        [item(prompt_ids="abc")],
        [item(prompt_ids=[1 << 40, 2, 3])],
        [item(logprobs=[0.0])],
        [item(logprobs=["x"] * 5)],
        [item(logprobs=[math.inf] * 5)],
        [item(prompt_ids=[1] * 5000, logprobs=[-1.0] * 5002)],
        [item(answer_ids=[1] * 97, logprobs=[-1.0] * 99)],
    ],
)
def test_what_is_no_probe_is_not_replayed(probes: object) -> None:
    assert golden_probes({"probes": probes}) == ()


def test_bounds_are_those_of_the_coarser_dtype() -> None:
    full, half = bounds_for("float32", "float32"), bounds_for("float32", "bfloat16")
    assert full.each < half.each and full.floor < half.floor and half == bounds_for("bfloat16", "float32")
    assert bounds_for("None", "float32") == half, "of unknown make"
    assert reference_bounds({"dtype": "float32"}, "float32") == full
    of_4_bits = {"dtype": "float32", "arguments": {"method": "qlora"}}
    assert not reference_bounds(of_4_bits, "float32").comparable
    assert not reference_bounds({"dtype": "float32"}, "float32", quantised=True).comparable


def test_a_proof_comes_back_as_it_went_and_another_format_does_not() -> None:
    proof = proof_of(TableEngine(off=lambda place: 1.0))
    body = json.loads(json.dumps(proof.to_json()))
    assert Proof.from_json(body) == proof
    with pytest.raises(ValueError, match="another format"):
        Proof.from_json({**body, "format": 0})


def test_a_proof_is_told_in_lines_whatever_it_holds() -> None:
    told = list(lines(proof_of(TableEngine(off=lambda place: 0.02)).to_json()))
    assert told == ["proof: proven; 1 probes, 5 tokens, off by 0.02 nats; effect 8.92 nats"]
    assert len(list(lines(proof_of(TableEngine(off=lambda place: 1.0)).to_json()))) == 2
    assert list(lines({})) == ["proof: None"]
    assert list(lines({"reasons": 3, "effect": "x", "kind": "probes", "largest": []})) == ["proof: None"]
