"""The server's own counters (`/metrics`) against what the client counted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serve.loadtest.records import RequestRecord
from vllm_lora_ext.errors import ServerFailed

# what is counted -> vLLM's counter of it (vllm/v1/metrics/loggers.py)
COUNTERS = {
    "requests": "vllm:request_success_total",
    "prompt tokens": "vllm:prompt_tokens_total",
    "output tokens": "vllm:generation_tokens_total",
}


@dataclass(frozen=True)
class Count:
    """One quantity, as both sides counted it over the run."""

    what: str
    server: int
    client: int

    @property
    def agrees(self) -> bool:
        """Whether both are equal."""
        return self.server == self.client


def read_counters(url: str, text: str | None) -> dict[str, float]:
    """The sums over all labels of the counters that we compare.

    Raises:
        ServerFailed: the page is missing, or lacks one of them.
    """
    if text is None:
        raise ServerFailed(f"{url}/metrics", "is not there", "Leave --prometheus out for this server.")
    from prometheus_client.parser import text_string_to_metric_families

    sums: dict[str, float] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("finished_reason") not in ("abort", "error"):
                    sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    except ValueError as error:
        raise ServerFailed(f"{url}/metrics", f"cannot be read ({error})") from error
    missing = [name for name in COUNTERS.values() if not math.isfinite(sums.get(name, math.nan))]
    if missing:
        fix = "These are vLLM's names; leave --prometheus out for another server."
        raise ServerFailed(f"{url}/metrics", f"has no {', '.join(missing)}", fix)
    return {what: sums[name] for what, name in COUNTERS.items()}


def compare_counters(
    before: dict[str, float], after: dict[str, float], records: Sequence[RequestRecord]
) -> list[Count]:
    """Both counts of each quantity. Requests that failed count on neither side."""
    good = [record for record in records if record.error is None]
    client = {
        "requests": len(good),
        "prompt tokens": sum(record.prompt_tokens for record in good),
        "output tokens": sum(record.output_tokens for record in good),
    }
    return [Count(what, round(after[what] - before[what]), client[what]) for what in COUNTERS]
