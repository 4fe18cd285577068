"""Which version a request's `model` stands for, here and now, and what to say when it stands for none.

Looks at the catalog that this process shares with whoever changes it; a change counts from the moment it
is on the disk.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from serve.openai_errors import ApiError
from serve.served import ServedVersion
from vllm_lora_ext.admission import refused
from vllm_lora_ext.catalog import Catalog
from vllm_lora_ext.contract import template_to_use
from vllm_lora_ext.errors import AdapterUnknown, VllmLoraError
from vllm_lora_ext.inspection import Rules
from vllm_lora_ext.names import ascii_shown
from vllm_lora_ext.publishing import judge_published
from vllm_lora_ext.records import Entry, Version
from vllm_lora_ext.spec import Finding, Severity, printable

_RETRY_FAILED_S = 30.0  # a version that the engine could not load is not tried again before
_RETRY_AFTER_S = 1
_MAX_MODEL_LENGTH = 200  # a name of 64 characters, '@' and a digest
_UNKNOWN_KEPT = 1024


@dataclass(frozen=True)
class _Unservable:
    version: Version
    findings: tuple[Finding, ...]
    until: float | None = None  # by the clock; None: as long as the version is in the catalog


class LiveAdapters:
    """Names of one server. `pending` tells which names are being looked at, and why they are not served yet.

    `retired` hears of each version (`name@digest12`) that nobody will ask for by its name any more.
    `missing` tells what a version still lacks to be served: a refusal, or a warning for what is on its way.
    """

    def __init__(
        self,
        catalog: Catalog | None,
        rules: Rules,
        stated_template: str | None,
        pending: Callable[[], Mapping[str, str]] = dict,
        retired: Callable[[str], None] = lambda model: None,
        clock: Callable[[], float] = time.monotonic,
        missing: Callable[[str, Version], Finding | None] = lambda name, version: None,
    ) -> None:
        self._missing = missing
        self.catalog, self.rules, self.pending = catalog, rules, pending
        self._stated_template, self._retired, self._clock = stated_template, retired, clock
        self._served: dict[tuple[str, str], ServedVersion | _Unservable] = {}
        self._unknown: dict[str, ApiError] = {}
        self._revision = -1
        self._asked: set[tuple[str, str]] = set()  # name and digest of what answers to a bare name
        self._chance = random.Random()

    @property
    def base_name(self) -> str:
        """The base model's public name."""
        return self.rules.base_names[0]

    def names(self) -> list[str]:
        """Names of adapters that are served, as far as nobody has tried them."""
        self.refresh()
        return [entry.name for entry in self._entries() if not self.findings(entry)]

    def refresh(self) -> None:
        """Take note of what changed in the catalog."""
        if self.catalog is None or self.catalog.revision == self._revision:
            return
        self._revision = self.catalog.revision
        self._unknown.clear()
        asked = {(entry.name, digest) for entry in self._entries() for digest in {entry.live, *entry.traffic}}
        known = {(entry.name, version.digest) for entry in self._entries() for version in entry.versions}
        left, self._asked = self._asked - asked, asked
        for key, served in list(self._served.items()):
            # A version that is asked for by its digest stays as long as it is there.
            if isinstance(served, ServedVersion) and (key in left or key not in known):
                self._retired(served.model)
            if key not in known:
                del self._served[key]

    def resolve(self, model: object, user: str | None = None) -> ServedVersion | None:
        """The version that answers to `model`, None for the base; requests of one `user` keep to one version.

        Raises:
            ApiError: 400 without a model, 404 for one that is not served, 503 for one that soon will be.
        """
        if model is None or model == "":
            raise ApiError(400, "You must provide a model parameter.", "model_required", param="model")
        if not isinstance(model, str):
            raise ApiError(400, "model: must be a text.", "invalid_value", param="model")
        if model in self.rules.base_names:
            return None
        if len(model) > _MAX_MODEL_LENGTH:
            text = f"model: must have at most {_MAX_MODEL_LENGTH} characters."
            raise ApiError(400, text, "invalid_value", param="model")
        self.refresh()
        name, separator, digest = model.partition("@")
        if (known := self._unknown.get(model)) is not None and name not in self.pending():
            raise replace(known)  # one that is raised collects what it passes through
        try:
            entry = self._entry(name, model)
            version = self._pinned(entry, digest) if separator else self._split(entry, user)
        except ApiError as error:
            if error.status == 404:
                self._remember(model, error)
            raise
        return self._servable(entry, version)

    def served(self, name: str, version: Version) -> ServedVersion:
        """A version of the store as it would be served, whether a name has it or not.

        Raises:
            VersionMissing, VersionDamaged: the store does not hold it.
        """
        assert self.catalog is not None
        stored = self.catalog.store.open(version.digest)
        trained = replace(stored.chat, trained=version.template == "trained")
        return ServedVersion(name, version, stored, template_to_use(trained, self._stated_template))

    def findings(self, entry: Entry) -> Sequence[Finding]:
        """What speaks against serving the live version of a name; empty if nothing is known."""
        served = self._look(entry.name, entry.live_version)
        return served.findings if isinstance(served, _Unservable) else ()

    def note_failure(self, version: ServedVersion, reason: str) -> None:
        """The engine could not load this version; requests hear so for a while, before it is tried again."""
        rule, fix = f"could not be loaded by the engine ({reason})", "Publish another version."
        self._fail(version.name, version.version, Finding("load_failed", version.model, rule, fix))

    def note_success(self, version: ServedVersion) -> None:
        """The engine has loaded this version, whatever was noted of it before."""
        key = (version.name, version.version.digest)
        if isinstance(self._served.get(key), _Unservable):
            del self._served[key]

    def _entries(self) -> list[Entry]:
        return [] if self.catalog is None else self.catalog.entries()

    def _entry(self, name: str, model: str) -> Entry:
        assert self.rules.base_names
        try:
            if self.catalog is not None:
                return self.catalog.entry(name)
        except AdapterUnknown:
            pass
        if name in self.pending():
            raise _not_yet(model, self.pending()[name])
        raise self._not_found(model, self._refusal(name))

    def _refusal(self, name: str) -> str:
        """Why the folder of that name is not served, if there is one that was refused."""
        records = self.catalog.folders().values() if self.catalog is not None else ()
        for record in records:
            if record.name == name and record.findings:
                return "Its adapter was refused: " + "; ".join(map(str, record.findings))
        return ""

    def _not_found(self, model: str, why: str = "") -> ApiError:
        shown = model if printable(model) == model else ascii_shown(model)
        message = f"The model `{shown}` does not exist."
        if not why:
            names = [*self.rules.base_names, *(entry.name for entry in self._entries())]
            near = difflib.get_close_matches(model.partition("@")[0], names, 3)
            why = f"Did you mean {' or '.join(near)}?" if near else ""
        return ApiError(404, f"{message} {why}".strip(), "model_not_found", param="model")

    def _pinned(self, entry: Entry, digest: str) -> Version:
        assert self.catalog is not None
        try:
            return self.catalog.resolve(entry.name, digest)
        except AdapterUnknown as error:
            raise self._not_found(f"{entry.name}@{digest}", f"{error}") from error

    def _split(self, entry: Entry, user: str | None) -> Version:
        if not entry.traffic:
            return entry.live_version
        place = self._chance.randrange(100)
        if user is not None:
            place = int.from_bytes(hashlib.sha256(f"{entry.name}\0{user}".encode()).digest()[:8]) % 100
        for version in entry.versions:
            place -= entry.traffic.get(version.digest, 0)
            if place < 0:
                return version
        return entry.live_version

    def _servable(self, entry: Entry, version: Version) -> ServedVersion:
        served = self._look(entry.name, version)
        if isinstance(served, _Unservable):
            why = "; ".join(map(str, served.findings))
            if all(finding.severity is Severity.WARNING for finding in served.findings):
                raise _not_yet(f"{entry.name}@{version.short}", served.findings[0].rule)
            raise self._not_found(f"{entry.name}@{version.short}", f"Its adapter was refused: {why}")
        return served

    def _look(self, name: str, version: Version) -> ServedVersion | _Unservable:
        """What became of judging a version, which is done once for each time that it was published."""
        key = (name, version.digest)
        known = self._served.get(key)
        expired = isinstance(known, _Unservable) and known.until is not None and known.until < self._clock()
        if known is None or expired or known.version != version:
            known = self._served[key] = self._judge(name, version)
        if isinstance(known, ServedVersion) and (lack := self._missing(name, version)) is not None:
            return _Unservable(version, (lack,))
        return known

    def _judge(self, name: str, version: Version) -> ServedVersion | _Unservable:
        assert self.catalog is not None
        findings = judge_published(name, version, self.catalog, self.rules)
        if refused(findings):
            return _Unservable(version, tuple(findings))
        try:
            return self.served(name, version)
        except VllmLoraError as error:
            return self._fail(name, version, Finding("version_damaged", error.item, error.rule, error.fix))

    def _fail(self, name: str, version: Version, finding: Finding) -> _Unservable:
        failure = _Unservable(version, (finding,), self._clock() + _RETRY_FAILED_S)
        self._served[name, version.digest] = failure
        return failure

    def _remember(self, model: str, error: ApiError) -> None:
        """A name that is not there is not looked for again until something changes."""
        if len(self._unknown) >= _UNKNOWN_KEPT:
            self._unknown.clear()
        self._unknown[model] = error


def _not_yet(model: str, why: str) -> ApiError:
    message = f"The model `{model}` is being loaded: {why.rstrip('.')}."
    headers = {"Retry-After": str(_RETRY_AFTER_S)}
    return ApiError(503, message, "adapter_loading", "server_error", "model", headers)
