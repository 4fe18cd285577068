"""What the watch knows of one place of adapters and of one folder in it. No threads; time is given."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from vllm_lora_ext.completeness import incomplete
from vllm_lora_ext.errors import BadSetting, VllmLoraError
from vllm_lora_ext.inspection import source_signature
from vllm_lora_ext.records import FolderRecord
from vllm_lora_ext.sources import AdapterSource, find_sources, name_and_place

logger = logging.getLogger("vllm.vllm_lora")

QUIET_S = 0.5  # as long nothing in a folder may change before it is taken, or be absent before it retires
_RETRY_S, _MOST_RETRY_S = 30.0, 600.0  # after a refusal whose cause lies outside the folder


class Place:
    """One value of `--adapters`; `sources` are what is there, if it `is_listed`."""

    def __init__(self, value: str) -> None:
        name, place = name_and_place(value)
        self.root = None if "://" in place else Path(place)
        self.sources: list[AdapterSource] = []
        self.is_listed = False
        self._value, self._is_one_adapter = value, name is not None
        self._device: int | None = None
        self._trouble = ""

    def look(self) -> None:
        """List it, which may fail: then nothing is known of what is there."""
        try:
            self.sources, self.is_listed, self._trouble = self._found(), True, ""
        except (VllmLoraError, OSError, ValueError) as error:
            self.is_listed = False
            if str(error) != self._trouble:
                self._trouble = str(error)
                logger.warning("%s Nothing retires until then.", error)

    def _found(self) -> list[AdapterSource]:
        if self.root is None:
            return find_sources([self._value])
        if self._is_one_adapter and self.root.parent.is_dir() and not self.root.exists():
            return []
        sources, device = find_sources([self._value]), self.root.stat().st_dev
        if not sources and self._device not in (None, device):
            rule = "is empty and on another disk than before"
            raise BadSetting(str(self.root), rule, "Mount the disk again.")
        self._device = device
        return sources


class State(Enum):
    """What a look at a folder says."""

    SETTLED = auto()  # it was judged as it is
    KNOWN = auto()  # so it was, unless the rules or what is stated for it changed
    INCOMPLETE = auto()
    CHANGING = auto()
    READY = auto()
    ADMITTING = auto()
    RESTING = auto()  # refused for now, for a cause outside of it


_Signature = tuple[tuple[int, ...], ...]


@dataclass
class Folder:
    """One source (a folder, or what is fetched) from look to look."""

    source: AdapterSource
    place: Place | None = None  # None if it was stated one by one
    state: State = State.CHANGING
    key: str = ""
    is_there: bool = True
    missing_since: float | None = None
    incomplete_since: float = math.inf
    _why: str | None = None
    _record: FolderRecord | None = None
    _signature: _Signature | None = None
    _tried: _Signature | None = None
    _changed_at: float = -math.inf
    _failures: int = 0
    _retry_at: float = -math.inf

    @property
    def reason(self) -> str | None:
        """Why it is still to be taken."""
        reasons = {State.CHANGING: "is being looked at", State.READY: "waits for its turn"}
        return self._why if self.state is State.INCOMPLETE else reasons.get(self.state)

    def look(
        self, records: Mapping[str, FolderRecord], clock: Callable[[], float], is_admitting: bool
    ) -> None:
        """Bring `state` up to date; `records` are what the catalog knows."""
        now, path = clock(), self.source.folder
        signature = () if path is None else source_signature(path)
        if signature != self._signature:
            self._signature, self._changed_at, self.key = signature, clock(), self.source.key
            self.state = State.CHANGING
            self.retry()
        record = records.get(self.key)
        is_known = record is not None and record.signature == signature
        if is_admitting:
            self.state = State.ADMITTING
            return
        if self._tried is not None:
            self._judge_attempt(is_known and record != self._record, now)
        self._record = record
        if self.state is not State.SETTLED and now >= self._retry_at:
            self.state = self._judge(path, is_known, now)

    def _judge_attempt(self, is_noted: bool, now: float) -> None:
        if self._tried == self._signature:
            self.state = State.SETTLED
            if not is_noted:
                self.rest(now)
        self._tried = None

    def _judge(self, path: Path | None, is_known: bool, now: float) -> State:
        self._why = None if is_known or path is None else incomplete(path)
        self.incomplete_since = min(self.incomplete_since, now) if self._why else math.inf
        if self._why:
            return State.INCOMPLETE
        if is_known:
            return State.KNOWN
        return State.READY if path is None or now - self._changed_at >= QUIET_S else State.CHANGING

    def hand_over(self) -> None:
        """Its admission begins; the first look after it judges what became of it."""
        self.state, self._tried = State.ADMITTING, self._signature

    def rest(self, now: float) -> None:
        """Leave it alone until it changes, or for a while that is longer each time."""
        self.state = State.RESTING
        self._retry_at = now + min(_RETRY_S * 2**self._failures, _MOST_RETRY_S)
        self._failures += 1

    def retry(self) -> None:
        """The cause of a refusal may be gone."""
        self._retry_at, self._failures = -math.inf, 0

    def miss(self, now: float, is_folder: bool) -> bool:
        """It is not among those that are listed; whether it is gone for good.

        One that was emptied is still there, and what it served is served until the folder goes.
        """
        self.is_there = is_folder
        if is_folder:
            self.missing_since = None
            return False
        if self.missing_since is None:
            self.missing_since = now
        return now - self.missing_since >= QUIET_S
