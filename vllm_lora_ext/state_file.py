"""The state file of a catalog, written whole and atomically, and the lock of the one who writes it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadSetting, StateLocked, StateUnreadable
from vllm_lora_ext.failpoints import failpoint
from vllm_lora_ext.files import lock_file, read_whole, signature, write_new
from vllm_lora_ext.records import State
from vllm_lora_ext.strict_json import JsonRefused, canonical, parse_object

STATE_FILE, LOCK_FILE = "catalog.json", "lock"
STATE_FORMAT = 1
_PARTIAL = f".{STATE_FILE}.partial"
_MAX_STATE_BYTES = 1 << 30
_MAX_LOCK_BYTES = 4096


@dataclass(frozen=True)
class Saved:
    """A state that is on the disk, its revision, and how to tell that the file is still the same."""

    revision: int = 0
    state: State = field(default_factory=State)
    signature: tuple[int, int, int] | None = None


def read_state(folder: Path) -> Saved:
    """The state in a state folder, an empty one if there is none.

    Raises:
        StateUnreadable: it is damaged, or written by a later vllm-lora.
    """
    path = folder / STATE_FILE
    seen = signature(path)  # before reading, so that what is written meanwhile is noticed the next time
    fix = (
        "Put back a copy of it, or move it away: folders are then taken again, and names that were "
        "published by command have to be published again."
    )
    try:
        body = parse_object(read_whole(path, _MAX_STATE_BYTES))
    except FileNotFoundError:
        return Saved()
    except JsonRefused as error:
        raise StateUnreadable(str(path), f"is damaged: it {error.rule}", fix) from error
    except (OSError, ValueError) as error:
        raise StateUnreadable(str(path), f"cannot be read ({error})", fix) from error
    found = body.get("format")
    if found != STATE_FORMAT:
        rule = f"is of format {str(found)[:20]}, this vllm-lora knows {STATE_FORMAT}"
        raise StateUnreadable(str(path), rule, "Use the vllm-lora that wrote it, or a later one.")
    if not {"revision", "state", "checksum"} <= set(body) or body["checksum"] != _checksum(body):
        raise StateUnreadable(str(path), "is damaged: its checksum does not fit", fix)
    return Saved(body["revision"], State.from_json(body["state"]), seen)


def write_state(folder: Path, revision: int, state: State) -> Saved:
    """Put a state in the place of the one before; `sync_folder` makes that last.

    Raises:
        OSError: it could not be written; the one before is still there.
    """
    body = {"format": STATE_FORMAT, "revision": revision, "state": state.to_json()}
    body["checksum"] = _checksum(body)
    sweep_partial(folder)
    try:
        write_new(folder / _PARTIAL, canonical(body))
        failpoint("catalog.partial")
        (folder / _PARTIAL).rename(folder / STATE_FILE)
    finally:
        sweep_partial(folder)
    failpoint("catalog.renamed")
    return Saved(revision, state, signature(folder / STATE_FILE))


def sweep_partial(folder: Path) -> None:
    """Remove what a process that died while it wrote has left behind. For the one that may write."""
    (folder / _PARTIAL).unlink(missing_ok=True)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({key: body[key] for key in ("format", "revision", "state")})).hexdigest()


class StateLock:
    """The lock of a state folder. It ends with the process, and a forked child does not keep it.

    Raises:
        StateLocked: another process has it.
        BadSetting: the folder cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            self._file = (state_dir / LOCK_FILE).open("ab", buffering=0)
        except OSError as error:
            rule = f"cannot be used ({error.strerror})"
            raise BadSetting(str(state_dir), rule, "Choose another --state-dir.") from error
        if not lock_file(self._file.fileno()):
            self.release()
            rule = f"is in use by {owner(state_dir)}"
            raise StateLocked(str(state_dir), rule, "Stop it, or choose another --state-dir.")
        self._tell()
        os.register_at_fork(after_in_child=partial(_release_if_alive, weakref.ref(self)))

    def note_url(self, url: str) -> None:
        """Tell whoever meets the lock where the process that has it can be asked."""
        self._tell(url)

    def _tell(self, *more: str) -> None:
        with contextlib.suppress(OSError):  # the lock holds, whatever it says of its owner
            self._file.truncate(0)
            self._file.write("\n".join([f"process {os.getpid()}", *more, ""]).encode())

    def release(self) -> None:
        """Let another process have it."""
        self._file.close()


def owner(state_dir: Path) -> str:
    """Who has the lock of a state folder, or had it last: `process N`, or `process N at URL`."""
    try:
        told = read_whole(state_dir / LOCK_FILE, _MAX_LOCK_BYTES).decode().splitlines()
    except (OSError, ValueError):
        told = []
    return " at ".join(line for line in told[:2] if line.isprintable() and line) or "another process"


def _release_if_alive(reference: weakref.ref[StateLock]) -> None:
    if (lock := reference()) is not None:
        lock.release()
