"""A version is tried by one replica's engine before it goes live: the question, and who answers it.

With --require-proof it is proved as well.

The child listens on a socket in its replica's own folder, which nobody but this user can enter: no key, no
route. One line of JSON asks, one answers. An answer that does not come says nothing of the version.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.adapter_view import read_findings
from serve.scaleout.forwarding import Addressed
from vllm_lora_ext.errors import AdapterRefused, VllmLoraError
from vllm_lora_ext.records import Version
from vllm_lora_ext.spec import Finding

if TYPE_CHECKING:
    from serve.admin import Admin

_MAX_LINE_BYTES = 16 << 20  # a version with all its findings


@dataclass(frozen=True)
class Trial(Addressed):
    """Would `tried` load, as a version of `name`?"""

    name: str
    tried: Version


@dataclass(frozen=True)
class Trouble:
    """What an engine has against a version: the parts of the error that one server would give.

    `findings` are those of a proof that is required.
    """

    item: str
    rule: str
    fix: str
    findings: tuple[Finding, ...] = ()

    @classmethod
    def of(cls, error: VllmLoraError) -> Trouble:
        """From the error."""
        findings = error.findings if isinstance(error, AdapterRefused) else ()
        return cls(error.item, error.rule, error.fix, findings)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Trouble:
        """From what `dataclasses.asdict` made of one, also after JSON."""
        return cls(**{**body, "findings": tuple(read_findings(body["findings"]))})

    def error(self) -> VllmLoraError:
        """The error again, or one that is told in the same words."""
        if self.findings:
            return AdapterRefused(self.item, self.findings)
        return VllmLoraError(self.item, self.rule, self.fix)


async def answer_trials(socket: Path, admin: Admin) -> asyncio.Server:
    """Answer whoever asks at `socket`, as long as this event loop runs."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):
            asked = json.loads(await reader.readline())
            trouble = await _tried(admin, asked["name"], Version.from_json(asked["version"]))
            writer.write(json.dumps(trouble and dataclasses.asdict(trouble)).encode() + b"\n")
            await writer.drain()

    return await asyncio.start_unix_server(answer, socket, limit=_MAX_LINE_BYTES)


async def _tried(admin: Admin, name: str, version: Version) -> Trouble | None:
    try:
        await admin.try_load(name, version)
    except VllmLoraError as error:
        return Trouble.of(error)
    return None


async def ask_for_trial(socket: Path, trial: Trial) -> Trouble | None:
    """What the server behind `socket` has against a version; None if it loads.

    Raises:
        OSError: it is not there, or went away meanwhile.
    """
    reader, writer = await asyncio.open_unix_connection(socket, limit=_MAX_LINE_BYTES)
    with contextlib.closing(writer):
        asked = {"name": trial.name, "version": dataclasses.asdict(trial.tried)}
        writer.write(json.dumps(asked).encode() + b"\n")
        await writer.drain()
        if not (line := await reader.readline()):
            raise ConnectionResetError("the server went away")
        trouble = json.loads(line)
        return None if trouble is None else Trouble.from_json(trouble)
