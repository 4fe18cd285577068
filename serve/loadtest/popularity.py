"""Which model a request asks: the popularity of adapters, and the base model's share. Pure and seeded."""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vllm_lora_ext.errors import BadSetting

Distribution = Literal["uniform", "distinct", "skewed", "weights"]


@dataclass(frozen=True)
class Popularity:
    """`shares` are each model's share of the requests, adding up to 1; the base, if asked, stands first.

    With `in_turn` adapters are not drawn but take turns (`distinct`), and every so many requests
    are the base's.
    """

    models: tuple[str, ...]
    shares: tuple[float, ...]
    in_turn: bool = False
    has_base: bool = False

    def model_of(self, index: int, seed: int) -> str:
        """The model of request number `index`."""
        if self.in_turn:
            return self._in_turn(index)
        place = random.Random(f"{seed}/model/{index}").random()
        bounds = list(itertools.accumulate(self.shares))
        return self.models[min(bisect.bisect_right(bounds, place), len(self.models) - 1)]

    def _in_turn(self, index: int) -> str:
        if not self.has_base:
            return self.models[index % len(self.models)]
        base, *adapters = self.models
        of_base = [math.floor(number * self.shares[0] + 1e-9) for number in (index, index + 1)]
        if not adapters or of_base[1] > of_base[0]:
            return base
        return adapters[(index - of_base[0]) % len(adapters)]


def make_popularity(
    adapters: Sequence[str],
    base: str | None,
    distribution: Distribution,
    zipf_alpha: float = 1.0,
    weights: Mapping[str, float] | None = None,
    base_share: float | None = None,
) -> Popularity:
    """The popularity of `adapters`, in order from the most popular one, and of the base model.

    `uniform`: all alike. `distinct`: in turn. `skewed`: Zipf, the share of the adapter at rank k is
    proportional to 1 / k^alpha. `weights`: as stated by name. `base_share` is the base's share of all
    requests; None gives it as much as one adapter of `uniform`.

    Raises:
        BadSetting: there is no model to ask; weights or a share without sense.
    """
    adapters = tuple(adapters)
    if not adapters and base is None:
        raise BadSetting("--models", "there is no model to ask", "Is an adapter loaded? See `vllm-lora ls`.")
    if base is None and base_share:
        rule = "the base model is not among those asked, or the server does not tell which one it is"
        raise BadSetting("--base-share", rule, "Name it with --models, or leave --base-share out.")
    if base is not None and (not adapters or base_share == 1.0):
        return Popularity((base,), (1.0,), has_base=True)
    of_base = 0.0 if base is None else 1 / (len(adapters) + 1) if base_share is None else base_share
    raw = _raw_shares(adapters, distribution, zipf_alpha, weights or {})
    shares = [(1 - of_base) * share / sum(raw) for share in raw]
    in_turn = distribution == "distinct"
    if base is None or of_base == 0:
        return Popularity(adapters, tuple(shares), in_turn)
    return Popularity((base, *adapters), (of_base, *shares), in_turn, has_base=True)


def _raw_shares(
    adapters: Sequence[str], distribution: Distribution, zipf_alpha: float, weights: Mapping[str, float]
) -> list[float]:
    if distribution == "skewed":
        return [rank**-zipf_alpha for rank in range(1, len(adapters) + 1)]
    if distribution == "weights":
        if strangers := set(weights) - set(adapters):
            fix = f"They are: {', '.join(adapters[:8])}. The base's share is --base-share."
            raise BadSetting(f"--lora-weights {min(strangers)}", "is not among the adapters asked", fix)
        if sum(weights.values()) <= 0:
            raise BadSetting(
                "--lora-weights", "all of them are zero", "State NAME=WEIGHT with weights above 0."
            )
        return [weights.get(name, 0.0) for name in adapters]
    return [1.0] * len(adapters)
