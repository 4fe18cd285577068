"""The rank that each module gets: what exactness takes, or the smallest within the stated error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from train.conversion.factors import Factors, Spectrum
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.spec import ALLOWED_MAX_LORA_RANKS

MAX_SERVED_RANK = ALLOWED_MAX_LORA_RANKS[-1]
EXACT = 1e-6  # of a change; float32, in which adapters are stored, rounds about as much


@dataclass(frozen=True)
class ModuleResult:
    """`error` is the share of the module's change that `rank` leaves out, in the Frobenius norm."""

    module: str
    rank: int
    error: float


@dataclass(frozen=True)
class Limits:
    """`max_rank` None: exact or not at all, at whatever rank a server takes."""

    max_rank: int | None = None
    max_error: float = 0.01

    @property
    def most(self) -> int:
        return self.max_rank or MAX_SERVED_RANK


class TooFar(BadInput):
    """No LoRA within the limits is close enough; `results` has every module's error."""

    def __init__(self, item: str, rule: str, fix: str, results: tuple[ModuleResult, ...]) -> None:
        self.results = results
        super().__init__(item, rule, fix)


def reduced(
    changes: Iterable[tuple[str, Factors | Spectrum]], limits: Limits, advice: str = ""
) -> tuple[dict[str, Factors], tuple[ModuleResult, ...]]:
    """Module -> factors that a server takes, and what they leave out. Factors of a rank that it takes stay.

    `advice` says what else could be done where this cannot.

    Raises:
        TooFar: a module needs a higher rank, or loses more than is allowed.
        BadInput: nothing is changed at all.
    """
    found: dict[str, Factors] = {}
    results, needed = [], {}
    for module, change in changes:
        if isinstance(change, Factors):
            if change.rank <= limits.most:
                found[module] = change
                results.append(ModuleResult(module, change.rank, 0.0))
                continue
            change = _spectrum_of(change)
        if not change.norm:
            continue
        needed[module] = exact = change.rank_for(EXACT)
        rank = exact if exact <= limits.most else min(change.rank_for(limits.max_error), limits.most)
        found[module] = change.factors(rank)
        results.append(ModuleResult(module, rank, change.error(rank)))
    if not found:
        raise BadInput("the adapter", "changes nothing", "Train it again.")
    _require_close(tuple(results), needed, limits, advice)
    return found, tuple(results)


def _spectrum_of(change: Factors) -> Spectrum:
    from train.conversion.factors import spectrum_of

    return spectrum_of(change)


def _require_close(
    results: tuple[ModuleResult, ...], needed: Mapping[str, int], limits: Limits, advice: str
) -> None:
    if limits.max_rank is None:
        lossy = [one for one in results if one.error > EXACT]
        if lossy:
            worst = max(lossy, key=lambda one: needed[one.module])
            rule = f"takes rank {needed[worst.module]} to be exact, and a server takes {limits.most} at most"
            rule += f" ({len(lossy)} of {len(results)} modules)"
            fix = f"Approximate it with --max-rank, whose error is printed. {advice}"
            raise TooFar(worst.module, rule, fix, results)
        return
    far = [one for one in results if one.error > max(limits.max_error, EXACT)]
    if far:
        worst = max(far, key=lambda one: one.error)
        rule = f"loses {worst.error:.1%} of its change at rank {worst.rank}, more than {limits.max_error:.1%}"
        rule += f" ({len(far)} of {len(results)} modules)"
        raise TooFar(worst.module, rule, f"Raise --max-rank or --max-error. {advice}", results)
