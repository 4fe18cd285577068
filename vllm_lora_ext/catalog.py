"""The catalog: which names there are, their versions, which one is live, and how it came to that.

One state file, written whole and atomically, is the truth; folders are an inbox (see `inbox.py`). What
a method returned from is on the disk. One process writes, and holds a lock; any number read, and see a
change by the revision number.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_lora_ext.errors import (
    AdapterExists,
    AdapterUnknown,
    BadSetting,
    StateLocked,
    StateUnreadable,
    StoreFailed,
)
from vllm_lora_ext.failpoints import failpoint
from vllm_lora_ext.files import lock_file, read_whole, signature, sync_folder, write_new
from vllm_lora_ext.names import name_key
from vllm_lora_ext.records import Entry, Event, FolderRecord, State, Version
from vllm_lora_ext.spec import Finding
from vllm_lora_ext.store import AdapterStore
from vllm_lora_ext.strict_json import JsonRefused, canonical, parse_object

STATE_FILE, LOCK_FILE, STORE_FOLDER = "catalog.json", "lock", "store"
STATE_FORMAT = 1
KEEP_VERSIONS = 10
_MAX_STATE_BYTES = 1 << 30
_SHORTEST_PREFIX = 4


class Catalog:
    """Names and versions of one state folder; use it as a context manager, or `close` it.

    Raises:
        StateLocked: another process writes here.
        StateUnreadable: the state file is damaged, or written by a later vllm-lora.
    """

    def __init__(self, state_dir: Path, readonly: bool = False, keep_versions: int = KEEP_VERSIONS) -> None:
        self.state_dir, self.readonly, self.keep_versions = state_dir, readonly, keep_versions
        self.store = AdapterStore(state_dir / STORE_FOLDER)
        self.incoming = state_dir / "incoming"  # what is fetched from elsewhere passes here
        self._file = state_dir / STATE_FILE
        self._lock = None if readonly else _Lock(state_dir)
        self._seen: tuple[int, int, int] | None = None
        self.revision, self._state, self._together = 0, State(), False
        try:
            self.refresh()
            if not readonly:
                self._sweep()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Catalog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # What there is.

    def refresh(self) -> bool:
        """Read the state file if it changed; whether it did. For those that follow."""
        seen = signature(self._file)
        if seen == self._seen and (seen is not None or self.revision == 0):
            return False
        self.revision, self._state = _read_state(self._file)
        self._seen = seen
        return True

    def names(self) -> list[str]:
        """All names that are served, in order."""
        return sorted(self._state.entries)

    def entry(self, name: str) -> Entry:
        """A name with its versions.

        Raises:
            AdapterUnknown: there is none.
        """
        if name not in self._state.entries:
            known = ", ".join(self.names()[:10]) or "no adapter"
            raise AdapterUnknown(repr(name)[:80], "is no adapter here", f"There is: {known}.")
        return self._state.entries[name]

    def entries(self) -> list[Entry]:
        """All names with their versions, in order."""
        return [self._state.entries[name] for name in self.names()]

    def resolve(self, name: str, digest: str | None = None) -> Version:
        """A name's live version, or the one whose digest begins with `digest` (at least 4 digits).

        Raises:
            AdapterUnknown: no such name, no such version, or several.
        """
        entry = self.entry(name)
        wanted = entry.live if digest is None else digest
        if len(wanted) < _SHORTEST_PREFIX:
            rule = f"is too short for the beginning of a digest: {_SHORTEST_PREFIX} digits at least"
            raise AdapterUnknown(repr(wanted)[:80], rule, "`vllm-lora show` lists the versions.")
        found = [version for version in entry.versions if version.digest.startswith(wanted)]
        if len(found) != 1:
            there = ", ".join(version.digest[:12] for version in entry.versions)
            rule = f"is {'several versions' if len(found) > 1 else 'no version'} of {name}"
            raise AdapterUnknown(repr(wanted)[:80], rule, f"There is: {there}.")
        return found[0]

    def folders(self) -> Mapping[str, FolderRecord]:
        """What is known of the folders that were looked at, by their key."""
        return dict(self._state.folders)

    def proofs(self, digest: str) -> Mapping[str, Any]:
        """What was proved of a version."""
        return dict(self._state.proofs.get(digest, {}))

    def base(self) -> Mapping[str, str]:
        """Name and fingerprint of the base model that the versions were judged against; empty at first."""
        return dict(self._state.base)

    # What changes it. Each is on the disk when it returns.

    def publish(
        self,
        name: str,
        version: Version,
        replace: bool = True,
        folder: str | None = None,
        record: FolderRecord | None = None,
    ) -> Entry:
        """Make `version` the live one of `name`; it must be in the store.

        `folder` is the key of the folder that it comes from; None for a command, whose names no
        folder retires. `record` is what to note of that folder in the same change.

        Raises:
            AdapterExists: the name belongs to something else, or is there and `replace` is off.
            VersionMissing, VersionDamaged: the store does not hold it.
        """
        self.store.open(version.digest)

        def change(state: State) -> None:
            self._check_name(state, name, version, replace, folder)
            old = state.entries.get(name)
            event = Event(now(), "publish", version.digest)
            entry = (
                Entry.new(name, version, event, folder)
                if old is None
                else old.with_version(version, event, folder)
            )
            state.entries[name] = entry.pruned(self.keep_versions)
            if folder is not None and record is not None:
                state.folders[folder] = record

        self._commit(change)
        return self.entry(name)

    def _check_name(
        self, state: State, name: str, version: Version, replace: bool, folder: str | None
    ) -> None:
        key = name_key(name)
        twins = [other for other in state.entries if other != name and name_key(other) == key]
        if twins:
            rule = f"looks like {twins[0]}, which is there already"
            raise AdapterExists(name, [Finding("adapter_exists", name, rule, "Choose another name.")])
        old = state.entries.get(name)
        if old is None or old.live == version.digest or (old.folder is not None and old.folder == folder):
            return
        if folder is not None or not replace:
            whose = "another folder" if old.folder else "a command"
            rule = f"is there already with other content, published from {whose}"
            fix = "`vllm-lora publish DIR --replace` makes this its live version; or choose another name."
            raise AdapterExists(name, [Finding("adapter_exists", name, rule, fix)])

    def rollback(self, name: str, to: str | None = None) -> Version:
        """Make an earlier version live again: the one published before, or the one that begins with `to`.

        Raises:
            AdapterUnknown: no such name or version, or there is none before.
        """
        entry = self.entry(name)
        digest = self.resolve(name, to).digest if to is not None else entry.previous()
        if digest is None:
            fix = "`vllm-lora show` lists what there is; --to makes any of them live."
            raise AdapterUnknown(name, "has no earlier version than the live one", fix)

        def change(state: State) -> None:
            state.entries[name] = entry.with_live(digest, Event(now(), "rollback", digest))

        self._commit(change)
        return self.resolve(name)

    def set_traffic(self, name: str, percent: Mapping[str, int]) -> Entry:
        """Split a name's requests over versions: digest -> percent, 100 together; empty for the live one.

        Raises:
            AdapterUnknown: no such name or version.
            BadSetting: the percents do not make 100.
        """
        entry = self.entry(name)
        split = {self.resolve(name, digest).digest: share for digest, share in percent.items()}
        if split and (sum(split.values()) != 100 or any(type(s) is not int or s < 0 for s in split.values())):
            raise BadSetting("traffic", "percents must be whole numbers that make 100", "Change them.")

        def change(state: State) -> None:
            state.entries[name] = entry.with_traffic(split, Event(now(), "traffic", entry.live))

        self._commit(change)
        return self.entry(name)

    def remove(self, names: Collection[str], forget_folders: Collection[str] = ()) -> None:
        """Take names out of service. Their folders are not taken again until they change.

        `forget_folders` are folders that are gone: should one come back, it is new.

        Raises:
            AdapterUnknown: a name is not there; nothing was changed.
        """
        for name in names:
            self.entry(name)

        def change(state: State) -> None:
            for name in names:
                del state.entries[name]
            for key in forget_folders:
                state.folders.pop(key, None)

        self._commit(change)

    def note_folders(self, records: Mapping[str, FolderRecord]) -> None:
        """Remember what was found in folders that were looked at."""
        if records:
            self._commit(lambda state: state.folders.update(records))

    def note_base(self, name: str, fingerprint: str) -> None:
        """Remember which base model the versions are judged against."""
        base = {"name": name, "fingerprint": fingerprint}
        if self.base() != base:
            self._commit(lambda state: state.base.update(base))

    def record_proof(self, digest: str, kind: str, result: Mapping[str, Any]) -> None:
        """Keep what was proved of a version, beside the store, which is never written again."""
        self._commit(lambda state: state.proofs.setdefault(digest, {}).update({kind: dict(result)}))

    def collect(self) -> list[str]:
        """Remove from the store what no name needs and nobody leases; their digests."""
        if self.readonly:
            raise StateLocked(str(self.state_dir), "was opened for reading", "Open it for writing.")
        return self.store.collect(self._state.digests())

    # How it is kept.

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes in this block become one: on the disk at its end, or none of them if that fails."""
        before, self._together = self._state, True
        try:
            yield
        except BaseException:
            self._state = before
            raise
        finally:
            self._together = False
        after, self._state = self._state, before
        if after is not before:
            self._save(after)

    def _commit(self, change: Callable[[State], object]) -> None:
        if self._lock is None:
            raise StateLocked(str(self.state_dir), "was opened for reading", "Open it for writing.")
        state = self._state.copy()
        change(state)
        if self._together:
            self._state = state
        else:
            self._save(state)

    def _save(self, state: State) -> None:
        state.forget_proofs()
        failpoint("catalog.changed")
        try:
            self._write(state)
            # From here on whoever opens the file sees the change, so we do.
            self._state = state
            self.revision += 1
            self._seen = signature(self._file)
            sync_folder(self.state_dir)
        except OSError as error:
            raise StoreFailed(STATE_FILE, error) from error
        failpoint("catalog.committed")

    def _write(self, state: State) -> None:
        body = {"format": STATE_FORMAT, "revision": self.revision + 1, "state": state.to_json()}
        body["checksum"] = _checksum(body)
        partial = self.state_dir / f".{STATE_FILE}.partial"
        partial.unlink(missing_ok=True)
        try:
            write_new(partial, canonical(body))
            failpoint("catalog.partial")
            partial.rename(self._file)
        finally:
            partial.unlink(missing_ok=True)
        failpoint("catalog.renamed")

    def _sweep(self) -> None:
        (self.state_dir / f".{STATE_FILE}.partial").unlink(missing_ok=True)
        self.store.sweep()
        shutil.rmtree(self.incoming, ignore_errors=True)


def now() -> str:
    """The time as the catalog notes it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical({key: body[key] for key in ("format", "revision", "state")})).hexdigest()


class _Lock:
    """The lock of a state folder. It ends with the process, and a forked child does not keep it.

    Raises:
        StateLocked: another process has it.
        BadSetting: the folder cannot be used.
    """

    def __init__(self, state_dir: Path) -> None:
        try:
            state_dir.mkdir(parents=True, exist_ok=True)
            self._file = (state_dir / LOCK_FILE).open("a+")
        except OSError as error:
            rule = f"cannot be used ({error.strerror})"
            raise BadSetting(str(state_dir), rule, "Choose another --state-dir.") from error
        if not lock_file(self._file.fileno()):
            self._file.seek(0)
            owner = self._file.read(100).strip() or "another process"
            self.release()
            rule = f"is in use by {owner}"
            raise StateLocked(str(state_dir), rule, "Stop it, or choose another --state-dir.")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()}\n")
        self._file.flush()
        os.register_at_fork(after_in_child=partial(_release_if_alive, weakref.ref(self)))

    def release(self) -> None:
        """Let another process have it."""
        self._file.close()


def _release_if_alive(reference: weakref.ref[_Lock]) -> None:
    if (lock := reference()) is not None:
        lock.release()


def _read_state(path: Path) -> tuple[int, State]:
    fix = (
        "Put back a copy of it, or move it away: folders are then taken again, and names that were "
        "published by command have to be published again."
    )
    try:
        body = parse_object(read_whole(path, _MAX_STATE_BYTES))
    except FileNotFoundError:
        return 0, State()
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
    return body["revision"], State.from_json(body["state"])
