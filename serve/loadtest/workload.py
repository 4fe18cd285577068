"""What is asked, of whom, and when: the same seed gives the same schedule. Pure.

A request is a function of its number, so any part of a schedule can be made alone: client
processes each make their own part, and a run that ends by the clock needs no list.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from serve.loadtest.popularity import Popularity

Message = Mapping[str, str]
WORDS = (
    *("sun", "rain", "tree", "river", "stone", "bread", "light", "cloud", "road", "house", "bird", "song"),
    *("field", "ship", "star", "wind", "hand", "door", "hill", "lake", "fire", "moon", "leaf", "sand"),
    *("gate", "bell", "fish", "seed", "rope", "glass", "coat", "wheel"),
)


@dataclass(frozen=True)
class PlannedRequest:
    """One chat request. `due_s` is its arrival in seconds after the start; None in a closed loop.

    `prompt_number` tells prompts apart: requests of one number ask the same.
    """

    index: int
    model: str
    messages: tuple[Message, ...]
    prompt_number: int
    max_tokens: int
    due_s: float | None = None


@dataclass(frozen=True)
class Length:
    """A length in tokens, drawn evenly between two bounds, both included."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"{self.least}" if self.least == self.most else f"{self.least}:{self.most}"

    def draw(self, chance: random.Random) -> int:
        """One length."""
        return chance.randint(self.least, self.most)


@dataclass(frozen=True)
class TokenScale:
    """How many tokens a made-up prompt has on this server: `overhead` of the template, then `per_word`."""

    overhead: float = 0.0
    per_word: float = 1.0

    def words_for(self, tokens: int) -> int:
        """The number of words whose prompt is nearest to `tokens`; at least one."""
        return max(1, round((tokens - self.overhead) / self.per_word))


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered. What is None is drawn by the workload."""

    messages: tuple[Message, ...] | None
    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str | None = None
    due_s: float | None = None


@dataclass(frozen=True)
class Workload:
    """`arrivals` in seconds make it an open loop; without them it is a closed one.

    `prompts` come from a file, in turn; without them prompts of random words are made. `pool` limits
    how many different prompts there are. Another `series` has other random words, so that no run finds
    its prompts in the server's prefix cache.
    """

    popularity: Popularity
    input_length: Length = Length(16, 16)
    output_length: Length = Length(32, 32)
    seed: int = 0
    arrivals: Sequence[float] | None = None
    prompts: Sequence[Prompt] = ()
    pool: int | None = None
    series: str = ""
    scale: TokenScale = field(default_factory=TokenScale)

    def request(self, index: int) -> PlannedRequest:
        """Request number `index`, from 0."""
        chance = random.Random(f"{self.seed}/request/{index}")
        number = index if self.pool is None else chance.randrange(self.pool)
        if self.prompts:
            number %= len(self.prompts)
        model = self.popularity.model_of(index, self.seed)
        return self.ask(number, model, index, None if self.arrivals is None else self.arrivals[index])

    def ask(self, number: int, model: str, index: int = 0, due_s: float | None = None) -> PlannedRequest:
        """Prompt `number` as a request; a prompt that names its own model goes to that one."""
        prompt = self.prompts[number % len(self.prompts)] if self.prompts else Prompt(None)
        chance = random.Random(f"{self.seed}/{self.series}/prompt/{number}")
        tokens = prompt.input_tokens or self.input_length.draw(chance)
        return PlannedRequest(
            index=index,
            model=prompt.model or model,
            messages=prompt.messages or self._made_up(tokens, chance),
            prompt_number=number,
            max_tokens=prompt.output_tokens or self.output_length.draw(chance),
            due_s=due_s,
        )

    def _made_up(self, tokens: int, chance: random.Random) -> tuple[Message, ...]:
        text = " ".join(chance.choices(WORDS, k=self.scale.words_for(tokens)))
        return ({"role": "user", "content": text},)
