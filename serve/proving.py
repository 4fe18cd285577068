"""Proves on the running engine that adapters do what they did in training; see `vllm_lora_ext/parity.py`.

Every question takes its turn as a request does, one after the other, and counts for no adapter's metrics.
What was said of a version is kept in the catalog, and not asked again of the same base and engine. With
--require-proof a version is proved before it goes live. Without, it is proved afterwards, once it is in
memory and the server rests: nothing would be decided by it, so nobody should wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from serve.adapter_view import PROOF
from serve.live import LiveAdapters
from serve.manager import Manager
from serve.served import ServedVersion
from vllm_lora_ext.errors import AdapterRefused, AdapterUnknown, StoreFailed, VllmLoraError
from vllm_lora_ext.parity import (
    EFFECT_TEXTS,
    Answer,
    CannotScore,
    Proof,
    Verdict,
    check_effect,
    golden_probes,
    prove,
    reference_bounds,
)
from vllm_lora_ext.records import Version
from vllm_lora_ext.spec import Finding, Severity

logger = logging.getLogger("vllm.vllm_lora")

PENDING, FAILED, UNFINISHED = "proof_pending", "proof_failed", "proof_unfinished"
_ANSWER_S = 60.0  # for one question, with the wait for its turn
_LOOK_EVERY_S = 0.5
_REST_S = 5.0  # as long nobody asks for anything before a proof that nobody waits for: who measures, asks
_PATIENCE_S = 3600.0  # as long it is waited for a rest of a server that has none
_RETRY_S, _MOST_RETRY_S = 60.0, 3600.0  # after the engine could not be asked, longer each time
_MOST_NAMELESS = 256  # remembered of what was refused, and so has no name in the catalog
_Reply = TypeVar("_Reply")


class Scorer(Protocol):
    """An engine that is asked once it is the question's turn; a handle is the manager's, None the base.

    All raise CannotScore, or whatever else stands against it.
    """

    async def score(self, handle: Any, ids: Sequence[int]) -> list[float]:
        """The logarithm of each token's probability but the first's."""

    async def answer(self, handle: Any, ids: Sequence[int], most: int) -> Answer:
        """The greedy answer."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""


@dataclass(frozen=True)
class Place:
    """Where a proof holds: `base` and `engine` name it; the others are the engine's."""

    base: str
    engine: str
    dtype: str
    quantised: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"base": self.base, "engine": self.engine, "dtype": self.dtype, "quantised": self.quantised}


@dataclass(frozen=True)
class _Turns:
    """`vllm_lora_ext.parity.Engine` for one version: each question waits for its turn."""

    manager: Manager
    scorer: Scorer
    model: str

    async def score(self, ids: Sequence[int], with_adapter: bool) -> Sequence[float]:
        model = self.model if with_adapter else None
        return await self._asked(model, lambda handle: self.scorer.score(handle, ids))

    async def answer(self, prompt_ids: Sequence[int], most: int) -> Answer:
        return await self._asked(self.model, lambda handle: self.scorer.answer(handle, prompt_ids, most))

    async def _asked(self, model: str | None, ask: Callable[[Any], Awaitable[_Reply]]) -> _Reply:
        try:
            async with asyncio.timeout(_ANSWER_S), self.manager.turn(model, counts=False) as handle:
                return await ask(handle)
        except CannotScore:
            raise
        except TimeoutError:
            raise CannotScore(f"no answer within {_ANSWER_S:.0f} s") from None
        except Exception as error:  # whatever it is, it does not end the server
            reason = str(error).rstrip(".") or type(error).__name__
            raise CannotScore(reason, for_good=isinstance(error, ValueError)) from error


class Prover:
    """See the module. `required`: what is not proven does not go live."""

    def __init__(
        self,
        live: LiveAdapters,
        manager: Manager,
        scorer: Scorer,
        place: Place,
        required: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert live.catalog is not None
        self._live, self._manager, self._scorer = live, manager, scorer
        self._catalog, self.place, self.required, self._clock = live.catalog, place, required, clock
        self._proofs: dict[str, Proof] = {}  # by digest; of what was proved here
        self._unsaved: dict[str, None] = {}  # digests, the oldest first
        self._save_at = -math.inf
        self._retries: dict[str, tuple[int, float]] = {}  # how many, and when the next
        self._all_done_at = -1  # the catalog's revision at which nothing was left to prove
        self._one_at_a_time = asyncio.Lock()
        self._remember()

    def _remember(self) -> None:
        for entry in self._catalog.entries():
            for version in entry.versions:
                record = self._catalog.proofs(version.digest).get(PROOF)
                if isinstance(record, Mapping) and record.get("place") == self.place.to_json():
                    try:
                        self._proofs[version.digest] = Proof.from_json(record)
                    except (ValueError, TypeError, KeyError):  # of another version of ours
                        continue

    def record(self, digest: str) -> Mapping[str, Any]:
        """What is known of a version on this base and engine, as it is kept; empty if nothing is."""
        proof = self._proofs.get(digest)
        return {} if proof is None else {**proof.to_json(), "digest": digest, "place": self.place.to_json()}

    def missing(self, name: str, version: Version) -> Finding | None:
        """What keeps a version from being live: no proof, with --require-proof."""
        if not self.required:
            return None
        proof = self._proofs.get(version.digest)
        if proof is None or not proof.is_final:
            why = f": {proof.reasons[0]}" if proof is not None and proof.reasons else ""
            rule = f"is being proved on this engine{why}"
            return Finding(PENDING, f"{name}@{version.short}", rule, "", Severity.WARNING)
        return _finding(f"{name}@{version.short}", proof)

    async def require(self, version: ServedVersion) -> None:
        """Prove a version, and say so if it must not go live; a failure of before is tried again.

        Raises:
            AdapterRefused: it failed, or could not be proved.
        """
        if not self.required:
            return
        finding = _finding(version.model, await self.prove(version, again=True))
        if finding is not None:
            await self._manager.dismiss(version.model)
            raise AdapterRefused(version.name, [finding])

    async def require_of(self, name: str, version: Version) -> None:
        """The same of a version in the store."""
        await self.require(self._live.served(name, version))

    async def prove_live(self, most: int | None) -> None:
        """Prove the live versions of the first `most` names, or of all of them, one after the other."""
        for entry in self._catalog.entries()[:most]:
            with contextlib.suppress(VllmLoraError):  # a damaged one; who asks for it hears so
                await self.prove(self._live.served(entry.name, entry.live_version))
        await self.save()

    def refused(self) -> list[Finding]:
        """Why live versions, and folders that would replace them, are not served for want of a proof."""
        found = [self.missing(entry.name, entry.live_version) for entry in self._catalog.entries()]
        found += [item for record in self._catalog.folders().values() for item in record.findings]
        return [finding for finding in found if finding is not None]

    async def prove(self, version: ServedVersion, again: bool = False) -> Proof:
        """What replaying says, unless it was said before; `again` for what was not proven then."""
        digest = version.version.digest
        async with self._one_at_a_time:
            known = self._proofs.get(digest)
            if known is not None and (known.verdict is Verdict.PROVEN or (known.is_final and not again)):
                return known
            began = time.monotonic()
            proof = await self._replayed(version)
            self._note(digest, proof)
        level = logging.INFO if proof.verdict is Verdict.PROVEN else logging.WARNING
        why = "".join(f"; {reason}" for reason in proof.reasons)
        took = time.monotonic() - began
        logger.log(level, "Proof of adapter %s: %s (%.1f s)%s", version.model, proof.verdict, took, why)
        return proof

    async def _replayed(self, version: ServedVersion) -> Proof:
        noted = self._catalog.store.provenance(version.version.digest).get("identity")
        provenance = noted if isinstance(noted, Mapping) else {}
        probes = golden_probes(provenance)
        try:
            self._manager.hold(version)
        except VllmLoraError as error:
            return _unasked(error)
        try:
            engine = _Turns(self._manager, self._scorer, version.model)
            bounds = reference_bounds(provenance, self.place.dtype, self.place.quantised)
            if probes:
                return await prove(probes, engine, bounds)
            prompts = [self._scorer.encode(text) for text in EFFECT_TEXTS]
            return await check_effect(prompts, engine, bounds)
        finally:
            self._manager.release(version.model)

    def _note(self, digest: str, proof: Proof) -> None:
        self._proofs[digest] = proof
        if not self._catalog.readonly:
            self._unsaved[digest] = None
        count, _ = self._retries.pop(digest, (0, 0.0))
        if not proof.is_final:
            self._retries[digest] = count + 1, self._clock() + min(_RETRY_S * 2**count, _MOST_RETRY_S)
        for old in list(self._unsaved)[:-_MOST_NAMELESS]:
            del self._unsaved[old], self._proofs[old]
            self._retries.pop(old, None)

    async def save(self) -> None:
        """Put into the catalog what was said of versions that have a name; later, if the disk is full."""
        if not self._unsaved or self._clock() < self._save_at:
            return
        named = {version.digest for entry in self._catalog.entries() for version in entry.versions}
        for digest in [digest for digest in self._unsaved if digest in named]:
            record = self.record(digest)
            try:
                await asyncio.to_thread(self._catalog.record_proof, digest, PROOF, record)
            except StoreFailed as error:
                logger.error("%s", error)
                self._save_at = self._clock() + _RETRY_S
                return
            if self.record(digest) == record:
                self._unsaved.pop(digest, None)
        for digest in self._proofs.keys() - named - self._unsaved.keys():
            del self._proofs[digest]
            self._retries.pop(digest, None)

    async def run(self) -> None:
        """Until it is cancelled: prove what is live, once it may be proved, and keep what was said."""
        busy_since: float | None = None
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self.save()
                due = next(self._due(), None)
                busy_since = None if due is None else busy_since or self._clock()
                if due is not None and busy_since is not None and self._is_time(due, busy_since):
                    await self.prove(due)
                    busy_since = None
                    await self.save()
            except Exception:  # a flaw here must not keep the server from what it is asked
                logger.exception("Adapters cannot be proved")
                await asyncio.sleep(_RETRY_S)

    def _is_time(self, due: ServedVersion, busy_since: float) -> bool:
        """Whether somebody waits for this proof; else it is made once nothing is asked, or after long."""
        entry = {entry.name: entry for entry in self._catalog.entries()}.get(due.name)
        if self.required and entry is not None and due.version.digest in {entry.live, *entry.traffic}:
            return True
        return self._manager.quiet_seconds > _REST_S or self._clock() - busy_since > _PATIENCE_S

    def _due(self) -> Iterator[ServedVersion]:
        """What is to be proved; what answers to a bare name comes first."""
        for name, version in self._in_question() if self.required else self._in_memory():
            known = self._proofs.get(version.digest)
            _, retry_at = self._retries.get(version.digest, (0, 0.0))
            if known is None or (not known.is_final and self._clock() >= retry_at):
                try:
                    yield self._live.served(name, version)
                except VllmLoraError as error:
                    logger.warning("Adapter %s cannot be proved: %s", name, error)
                    self._note(version.digest, _unasked(error))

    def _in_memory(self) -> Iterator[tuple[str, Version]]:
        """Loading is left to who asks for an adapter: a proof that nothing depends on does not begin it."""
        for model in self._manager.gate.in_memory():
            name, _, digest = model.partition("@")
            with contextlib.suppress(AdapterUnknown):
                yield name, self._catalog.resolve(name, digest)

    def _in_question(self) -> Iterator[tuple[str, Version]]:
        """All versions, as long as one of them is not proven or refused."""
        revision = self._catalog.revision
        if self._all_done_at == revision:
            return
        entries = self._catalog.entries()
        for is_asked in (True, False):
            for entry in entries:
                named = {entry.live, *entry.traffic}
                yield from (
                    (entry.name, item) for item in entry.versions if (item.digest in named) is is_asked
                )
        if all(self._is_final(item) for entry in entries for item in entry.versions):
            self._all_done_at = revision

    def _is_final(self, version: Version) -> bool:
        proof = self._proofs.get(version.digest)
        return proof is not None and proof.is_final


def _unasked(error: VllmLoraError) -> Proof:
    return Proof(Verdict.UNPROVEN, "probes", reasons=(str(error),), is_final=False)


def _finding(model: str, proof: Proof) -> Finding | None:
    """Why a proof does not let a version go live; None if it does."""
    if proof.verdict is Verdict.PROVEN:
        return None
    why = "; ".join(proof.reasons)
    if not proof.is_final:
        return Finding(UNFINISHED, model, f"could not be proved: {why}", "Publish it again.")
    if proof.verdict is Verdict.UNPROVEN:
        fix = "Train it with `vllm-lora train`, which stores probes; or serve without --require-proof."
        return Finding(FAILED, model, f"is not proven: {why}", fix)
    fix = "Publish it as it was trained, and serve it with the base that it was trained on."
    return Finding(FAILED, model, f"does not do here what it did in training: {why}", fix)
