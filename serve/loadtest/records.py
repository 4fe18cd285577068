"""What is noted of each request and of a run. Times are seconds after the start of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Clock = Literal["kernel", "client"]
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class RequestRecord:
    """`chunks_s` are the arrivals of the chunks that carry text, `done_s` that of the last one of all.

    `due_s` is when the schedule wanted it sent (None in a closed loop), `begun_s` when the client began to
    prepare and to connect for it. `answered_by` is the response's `model`.
    `error` is a kind ("HTTP 404", "timeout"), `detail` the server's words. Token counts are the server's
    usage; where it tells none, output tokens are chunks and prompt tokens 0.
    """

    index: int
    model: str
    sent_s: float
    chunks_s: tuple[float, ...] = ()
    done_s: float = 0.0
    due_s: float | None = None
    begun_s: float = 0.0
    prompt_number: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    answered_by: str = ""
    error: str | None = None
    detail: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Sent to first chunk; None without a chunk."""
        return self.chunks_s[0] - self.sent_s if self.chunks_s else None

    @property
    def itl_s(self) -> list[float]:
        """Intervals between chunks."""
        return [after - before for before, after in zip(self.chunks_s, self.chunks_s[1:], strict=False)]

    @property
    def tpot_s(self) -> float | None:
        """(Last chunk - first chunk) / (output tokens - 1); None for a single token."""
        if self.output_tokens < 2 or not self.chunks_s:
            return None
        return (self.chunks_s[-1] - self.chunks_s[0]) / (self.output_tokens - 1)

    @property
    def e2el_s(self) -> float:
        """Sent to the last chunk."""
        return self.done_s - self.sent_s

    @property
    def lag_s(self) -> float | None:
        """How much later than due the client began with it; None in a closed loop."""
        return None if self.due_s is None else self.begun_s - self.due_s


@dataclass(frozen=True)
class ShareCost:
    """What one client process spent: CPU seconds in `wall_s` seconds; `delays_s` of a clock in it.

    The delays tell how long anything due in that process had to wait.
    """

    cpu_s: float
    wall_s: float
    delays_s: tuple[float, ...] = ()
    clock: Clock = "client"


@dataclass(frozen=True)
class RunRecord:
    """A run: `planned` requests were meant; `ended_early` says why not all were sent or finished."""

    records: tuple[RequestRecord, ...]
    costs: tuple[ShareCost, ...]
    planned: int | None
    ended_early: str | None = None
