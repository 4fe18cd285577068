"""Which replicas take part, and how far each is. Pure: time is given.

A replica takes part from its first report, with the revision of the catalog that its server goes by. It
reports again and again; one that has been silent for `LEASE_S` takes part no more, and by then it answers no
request either, since a replica that cannot report stops after `FENCE_S`. So a change that every member has
reported holds for every request that is accepted from then on. Where no controller runs nobody answers a
change, and replicas go on: Ray knows whether one runs, and a new one answers no change for a lease.
"""

from __future__ import annotations

from dataclasses import dataclass

REPORT_EVERY_S = 1.0
FENCE_S, LEASE_S = 8.0, 12.0
SILENT_S = 3.0  # three reports that did not come: time to ask Ray whether there is a controller


class Fence:
    """Tells a replica when it must not answer: it does not reach a controller that is there."""

    def __init__(self, now: float) -> None:
        self._safe_at = now

    def reported(self, at: float) -> None:
        """A report was heard; `at` is when it was sent."""
        self._safe_at = max(self._safe_at, at)

    def nobody_is_there(self, at: float) -> None:
        """No controller ran, `at` being before that was asked: nobody could have answered a change."""
        self._safe_at = max(self._safe_at, at)

    def should_ask(self, now: float) -> bool:
        """Whether no report was heard for so long that there may be no controller."""
        return now - self._safe_at > SILENT_S

    def silent_s(self, now: float) -> float:
        """For how long a controller may have counted without this replica; 0 while that cannot be."""
        silent = now - self._safe_at
        return silent if silent > FENCE_S else 0.0


@dataclass
class _Member:
    revision: int
    heard_at: float


class Membership:
    """See the module. `started_at`: replicas of before may be at work until a lease after it."""

    def __init__(self, started_at: float) -> None:
        self._started_at = started_at
        self._members: dict[str, _Member] = {}

    def report(self, replica: str, revision: int, now: float) -> None:
        """A replica goes by this revision now."""
        self._members[replica] = _Member(revision, now)

    def leave(self, replica: str) -> None:
        """A replica answers no more."""
        self._members.pop(replica, None)

    def members(self, now: float) -> list[str]:
        """Those that take part, in order."""
        for replica, member in list(self._members.items()):
            if now - member.heard_at > LEASE_S:
                del self._members[replica]
        return sorted(self._members)

    def behind(self, revision: int, now: float) -> list[str]:
        """The members that have not reported this revision yet."""
        return [replica for replica in self.members(now) if self._members[replica].revision < revision]

    def is_settled(self, now: float) -> bool:
        """Whether all that are at work have had the time to report."""
        return now - self._started_at >= LEASE_S
