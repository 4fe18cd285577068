"""Servers of known behaviour for the load test, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serve.loadtest.known_server import KnownAnswer, KnownServer

ADAPTERS = ("xiaoli", "marina", "otto")
CARDS: list[dict[str, Any]] = [{"id": "base", "parent": None}]
CARDS += [{"id": name, "parent": "base"} for name in ADAPTERS]

Serve = Callable[..., KnownServer]


def identity_answer(body: Mapping[str, Any], name: str | None = None) -> KnownAnswer:
    """`name` (default: the model that was asked) introduces itself, word by word; no such model is 404."""
    model = body["model"]
    if model not in {card["id"] for card in CARDS}:
        return KnownAnswer((f"The model `{model}` does not exist.",), status=404)
    words = f"I am {name or model} , made by the friends of {name or model} .".split()
    pieces = tuple(f"{word} " for word in words)[: body.get("max_tokens") or 99]
    return KnownAnswer(pieces, 0.01, 0.001, logprobs=[logprob(piece) for piece in pieces])


def logprob(token: str, value: float = -0.01, **others: float) -> dict[str, Any]:
    """One entry of `logprobs.content`, with what else could have come."""
    top = [{"token": name, "logprob": chance, "bytes": None} for name, chance in others.items()]
    own = {"token": token, "logprob": value, "bytes": None}
    return {**own, "top_logprobs": [own, *top]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's limit that this machine remembers is none of the tests'."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a `KnownServer`: base and three adapters that say their names, unless told otherwise."""
    with ExitStack() as stack:

        def start(
            answer_to: Callable[[Mapping[str, Any]], KnownAnswer] = identity_answer,
            cards: Sequence[Mapping[str, Any]] = CARDS,
            **more: Any,
        ) -> KnownServer:
            return stack.enter_context(KnownServer(cards, answer_to, **more).in_thread())

        yield start
