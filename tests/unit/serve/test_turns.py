"""Around the engine's `generate`: every request takes its turn, and is counted, however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from serve.gate import Limits
from serve.manager import Manager
from serve.metrics import Metrics
from serve.turns import TurnTaker
from tests.unit.serve.front_side import (
    CountedStore,
    FakeEngine,
    a_manager,
    a_version,
    nothing_is_held,
    run_simulated,
    spin,
)

A = a_version("a")
NAMED = SimpleNamespace(lora_name=A.model)


class Kind(Enum):
    """As vLLM's RequestOutputKind."""

    CUMULATIVE = 0
    DELTA = 1


@dataclass
class Generation:
    """vLLM's `generate`: three outputs of one token each, then whatever `ends` raises."""

    ends: Exception | None = None
    asked: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    closed: int = 0

    async def __call__(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any = None, **rest: Any
    ) -> AsyncIterator[Any]:
        self.asked.append((lora_request, rest))
        try:
            for number in range(1, 4):
                count = 1 if params.output_kind is Kind.DELTA else number
                yield SimpleNamespace(
                    prompt_token_ids=[1] * 5, outputs=[SimpleNamespace(token_ids=[7] * count)]
                )
                await asyncio.sleep(1)
            if self.ends is not None:
                raise self.ends
        finally:
            self.closed += 1


class Counter:
    """A manager with its turn taker, and what was counted."""

    def __init__(self, generation: Generation, running: int = 2) -> None:
        self.registry = CollectorRegistry()
        self.engine = FakeEngine()
        self.manager: Manager = a_manager(self.engine, CountedStore(), Limits(1, 2, running))
        metrics = Metrics(registry=self.registry, base_names=["base"])
        self.generate = TurnTaker(self.manager, metrics, "base", RuntimeError).wrap(generation)

    def value(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"vllm_lora_{name}", labels) or 0.0

    async def ask(self, lora: Any = NAMED, kind: Kind = Kind.CUMULATIVE, **more: Any) -> int:
        if lora is not None:
            self.manager.hold(A)
        try:
            params = SimpleNamespace(output_kind=kind)
            return len([out async for out in self.generate("hi", params, "1", lora_request=lora, **more)])
        finally:
            if lora is not None:
                self.manager.release(A.model)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(("lora", "label"), [(NAMED, "a"), (None, "base")])
def test_a_request_is_counted_for_its_adapter(lora: Any, label: str, kind: Kind) -> None:
    generation = Generation()
    counter = Counter(generation)
    assert run_simulated(counter.ask(lora, kind, priority=3)) == 3
    assert generation.asked == [(1 if lora else None, {"priority": 3})], "the engine gets what was loaded"
    assert counter.value("requests_total", adapter=label) == 1
    assert counter.value("prompt_tokens_total", adapter=label) == 5
    assert counter.value("generation_tokens_total", adapter=label) == 3
    assert counter.value("time_to_first_token_seconds_count", adapter=label) == 1
    assert counter.value("e2e_request_latency_seconds_count", adapter=label) == 1
    assert nothing_is_held(counter.manager)


def test_what_fails_is_counted_and_leaves_nothing() -> None:
    counter = Counter(Generation(ends=ValueError("too long")))
    with pytest.raises(ValueError, match="too long"):
        run_simulated(counter.ask())
    assert counter.value("errors_total", adapter="a", code="ValueError") == 1
    assert nothing_is_held(counter.manager)


def test_an_adapter_that_cannot_be_loaded_is_told_in_vllms_words() -> None:
    generation = Generation()
    counter = Counter(generation)
    counter.engine.failing[A.model] = "no room"
    with pytest.raises(RuntimeError, match="no room"):
        run_simulated(counter.ask())
    assert counter.value("errors_total", adapter="a", code="adapter_failed") == 1
    assert generation.asked == []
    assert nothing_is_held(counter.manager)


def test_who_leaves_ends_the_engines_request_before_its_place_is_free() -> None:
    generation = Generation()
    counter = Counter(generation, running=1)

    async def work() -> None:
        first = asyncio.create_task(counter.ask())
        await asyncio.sleep(0.5)
        second = asyncio.create_task(counter.ask(None))
        await asyncio.sleep(1.0)
        assert len(generation.asked) == 1
        first.cancel()
        await spin()
        assert generation.closed == 1
        assert await second == 3
        assert generation.closed == 2
        with pytest.raises(asyncio.CancelledError):
            await first
        assert nothing_is_held(counter.manager)

    run_simulated(work())
    assert counter.value("generation_tokens_total", adapter="a") == 2, "what it took is counted"
    assert counter.value("errors_total", adapter="a", code="CancelledError") == 0


def test_a_stream_that_is_closed_early_leaves_nothing() -> None:
    generation = Generation()
    counter = Counter(generation)

    async def work() -> None:
        stream = counter.generate("hi", SimpleNamespace(output_kind=Kind.DELTA), "1")
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        assert generation.closed == 1
        assert nothing_is_held(counter.manager)

    run_simulated(work())


def test_what_has_no_tokens_is_counted_too() -> None:
    """Pooling: outputs are a tensor, and parameters have no kind."""

    async def encode(prompt: Any, pooling_params: Any, request_id: str, **rest: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(prompt_token_ids=None, outputs=object())

    async def work() -> None:
        encoded = TurnTaker(counter.manager, metrics, "base", RuntimeError).wrap(encode)
        given = {"prompt": "hi", "pooling_params": SimpleNamespace(), "request_id": "1"}
        assert len([out async for out in encoded(**given)]) == 1
        assert nothing_is_held(counter.manager)

    counter = Counter(Generation())
    registry = CollectorRegistry()
    metrics = Metrics(registry=registry, base_names=["base"])
    run_simulated(work())
    assert registry.get_sample_value("vllm_lora_requests_total", {"adapter": "base"}) == 1
