"""What is asked, and of whom: the same seed gives the same requests in the same order. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

WORDS = [
    "sun",
    "rain",
    "tree",
    "river",
    "stone",
    "bread",
    "light",
    "cloud",
    "road",
    "house",
    "bird",
    "song",
    "field",
    "ship",
    "star",
    "wind",
]


@dataclass(frozen=True)
class PlannedRequest:
    """One chat request: `model` is an adapter's name or the base's."""

    model: str
    prompt: str
    max_tokens: int


def plan_requests(
    models: Sequence[str], num_requests: int, prompt_words: int, max_tokens: int, seed: int
) -> list[PlannedRequest]:
    """`num_requests` requests, the models in turn, each with a prompt of its own."""
    chance = random.Random(seed)
    return [
        PlannedRequest(
            models[number % len(models)],
            " ".join(chance.choices(WORDS, k=prompt_words)),
            max_tokens,
        )
        for number in range(num_requests)
    ]
