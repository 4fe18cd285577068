"""Every error that a user can meet.

    VllmLoraError                exit code 1: the work was fine, doing it failed
    ├── ServerUnreachable        no server answers at the address
    ├── ServerFailed             the server answered with an error, or ended
    │   └── IsolationBroken      the engine mixes adapters up, and must not serve
    ├── TrainingFailed           training ended without a usable adapter
    ├── StoreFailed              the store or the state file could not be written
    ├── VersionDamaged           a stored version is not as it was written
    └── BadInput                 exit code 2: something the user gave is wrong (also a ValueError)
        ├── BadSetting           a flag or a configuration value
        ├── BadData              training rows
        ├── IdentitiesRefused    some of several identities; carries what is wrong with each
        ├── BadBaseModel         a base model that is none, or cannot be read
        ├── AdapterRefused       an adapter that must not be used; carries its findings
        │   └── AdapterExists    another adapter has that name
        ├── AdapterUnknown       no adapter of that name, or no such version of it
        ├── VersionMissing       the store holds no version of that digest
        ├── StateLocked          another process works with the same state folder
        ├── StateUnreadable      the state file is damaged, or written by a later vllm-lora
        ├── OutputExists         the place to write to holds something else
        ├── PortInUse            another program listens there
        └── MissingPackage       an optional package is not installed

A message names the item, the rule that it breaks and the fix, in that order.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_lora_ext.spec import Finding


class VllmLoraError(Exception):
    """Base of all: `item` broke `rule`; `fix` says what to do; `adapter` is its name, if it has one."""

    exit_code = 1

    def __init__(self, item: str, rule: str, fix: str = "", adapter: str | None = None) -> None:
        self.item, self.rule, self.fix, self.adapter = item, rule, fix, adapter
        super().__init__(f"{item}: {rule}." + (f" {fix}" if fix else ""))


class ServerUnreachable(VllmLoraError):
    """No server answers at the address."""


class ServerFailed(VllmLoraError):
    """The server answered with an error, or ended before it was ready."""


class IsolationBroken(ServerFailed):
    """The engine answered a row with another row's adapter, or without its own."""

    def __init__(self, item: str, rule: str) -> None:
        fix = "Do not serve with this vLLM; `--no-isolation-check` starts it all the same. Please report it."
        super().__init__(item, rule, fix)


class TrainingFailed(VllmLoraError):
    """Training ended without a usable adapter, for example with a loss that is no number."""


class StoreFailed(VllmLoraError):
    """The store or the state file could not be written; both are as they were."""

    def __init__(self, place: str, error: OSError) -> None:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        rule = "the disk is full" if full else f"cannot be written ({error.strerror})"
        super().__init__(place, rule, "Free some space, or choose another --state-dir.")


class VersionDamaged(VllmLoraError):
    """A stored version is not as it was written, and is not served."""

    def __init__(self, version: str, rule: str) -> None:
        super().__init__(f"version {version}", rule, "Publish the adapter again; check the disk.")


class BadInput(VllmLoraError, ValueError):
    """Something the user gave is wrong; nothing was changed."""

    exit_code = 2


class BadSetting(BadInput):
    """A flag or a configuration value."""


class BadData(BadInput):
    """Training rows that cannot be read or must not be trained on."""


class IdentitiesRefused(BadInput):
    """Some of several identities that cannot be trained; `problems` says why, all of it at once."""

    def __init__(self, problems: Sequence[tuple[str, VllmLoraError]]) -> None:
        self.problems = tuple(problems)
        told = "".join(f"\n  {name}: {error}" for name, error in self.problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''}"
        super().__init__("the identities", f"{count}, and nothing was trained:{told}".rstrip("."))


class BadBaseModel(BadInput):
    """A folder that is not a model, or a hub id that cannot be reached."""


class OutputExists(BadInput):
    """The place to write to holds something that is not ours to replace."""


class PortInUse(BadInput):
    """Another program listens at the address."""


class MissingPackage(BadInput):
    """A package that this command needs is not installed."""


class AdapterRefused(BadInput):
    """An adapter that must not be used; `findings` says why, all of it at once."""

    def __init__(self, adapter: str, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(
            adapter,
            "refused: " + "; ".join(str(finding) for finding in self.findings).rstrip("."),
            adapter=adapter,
        )


class AdapterExists(AdapterRefused):
    """Another adapter has that name, and replacing it was not asked for."""


class AdapterUnknown(BadInput):
    """No adapter of that name, or no such version of it."""


class VersionMissing(BadInput):
    """The store holds no version of that digest."""

    def __init__(self, version: str) -> None:
        super().__init__(f"version {version}", "is not in the store", "`vllm-lora ls` shows what is.")


class StateLocked(BadInput):
    """Another process works with the same state folder."""


class StateUnreadable(BadInput):
    """The state file is damaged, or written by a later vllm-lora; nothing was changed."""
