"""Ray Serve's request router, deciding by `placement.py`; all else (queues, probes, deaths) is Ray's.

Ray's own multiplexed routing is not used: it bounds nothing but what one replica holds, and unloads models
by an LRU of its own, where the engine's manager has to be the only owner of what is loaded.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve.scaleout.forwarding import Addressed
from serve.scaleout.placement import Placement, Rules

_SWEEP_EVERY_S = 10.0


class AffinityRouter(RequestRouter):  # type: ignore[misc]  # Ray may not be installed
    """One per handle; it knows the requests that it sent itself, and what replicas tell of others'."""

    def initialize_state(
        self,
        most: int = 0,
        calm: int = 8,
        slack: float = 1.25,
        cool_s: float = 60.0,
        policy: str = "affinity",
    ) -> None:
        """Called by Ray with `request_router_kwargs`; with `spread` all go to the least loaded."""
        self._placement = Placement(Rules(most, slack, calm, cool_s))
        self._policy = policy
        self._sent: dict[str, ReplicaID] = {}
        self._ongoing: Counter[ReplicaID] = Counter()
        self._swept_at = 0.0

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The replicas that a request may go to, one rank each, so that Ray takes the first that has room."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # when all of them are full
        sent = _sent(pending_request)
        if sent.to is not None:
            return [[by_name[sent.to]]] if sent.to in by_name else []
        if len(by_name) > 1:
            by_name.pop(sent.avoid or "", None)
        loads = {name: self._load(replica.replica_id) for name, replica in by_name.items()}
        ranked = self._ranked(sent.version, loads)
        return [[by_name[name]] for name in ranked]

    def _ranked(self, version: str | None, loads: dict[str, int]) -> tuple[str, ...]:
        now = time.monotonic()
        if now - self._swept_at > _SWEEP_EVERY_S:
            self._swept_at = now
            self._placement.sweep(now)
        return self._placement.route(None if self._policy == "spread" else version, loads, now)

    def _load(self, replica: ReplicaID) -> int:
        """Ongoing requests: those of this router at once, those of others as Ray learns of them."""
        return max(self._ongoing[replica], self.replica_queue_len_cache.get(replica) or 0)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Ray tells that a replica has taken a request."""
        self._sent[pending_request.metadata.internal_request_id] = replica_id
        self._ongoing[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Ray tells that a request has ended, or was not taken."""
        if self._sent.pop(internal_request_id, None) is not None:
            self._ongoing[replica_id] -= 1
            if self._ongoing[replica_id] <= 0:
                del self._ongoing[replica_id]


def _sent(pending: PendingRequest | None) -> Addressed:
    """The request as it was sent; one that any replica can take where Ray asks for none in particular."""
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, Addressed) else Addressed()
