"""The catalog: which names there are, their versions, which one is live, and how it came to that.

One state file, written whole and atomically, is the truth; folders are an inbox (see `inbox.py`). What
a method returned from is on the disk. One process writes, and holds a lock; any number read, and see a
change by the revision number. Within a process any thread may read and write: changes come one after the
other, and a reader sees what was saved last, never what another thread is still putting together.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from vllm_lora_ext.errors import AdapterExists, AdapterUnknown, BadSetting, StateLocked, StoreFailed
from vllm_lora_ext.failpoints import failpoint
from vllm_lora_ext.files import signature, sync_folder
from vllm_lora_ext.names import name_key
from vllm_lora_ext.records import Entry, Event, FolderRecord, State, Version
from vllm_lora_ext.spec import Finding
from vllm_lora_ext.state_file import STATE_FILE, Saved, StateLock, read_state, sweep_partial, write_state
from vllm_lora_ext.store import AdapterStore

STORE_FOLDER = "store"
KEEP_VERSIONS = 10
_T = TypeVar("_T")


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
        self._lock = None if readonly else StateLock(state_dir)
        self._saved = Saved()  # replaced as a whole, so that a reader never sees half of a change
        self._draft: tuple[int, State] | None = None  # what `together` has so far, for its own thread only
        self._writing = threading.RLock()
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
        with self._writing:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def note_url(self, url: str) -> None:
        """Note where this process can be asked, for those who meet its lock."""
        self._must_write().note_url(url)

    # What there is.

    @property
    def revision(self) -> int:
        """The number of the saved state; read it before what you follow, and no change is missed."""
        return self._saved.revision

    @property
    def _state(self) -> State:
        """What this thread sees, never changed: its own changes so far, or what was saved last."""
        draft = self._draft
        return draft[1] if draft is not None and draft[0] == threading.get_ident() else self._saved.state

    def refresh(self) -> bool:
        """Read the state file if it changed; whether it did. For those that follow."""
        with self._writing:
            if signature(self.state_dir / STATE_FILE) == self._saved.signature:
                return False
            self._saved = read_state(self.state_dir)
            return True

    def names(self) -> list[str]:
        """All names that are served, in order."""
        return sorted(self._state.entries)

    def entry(self, name: str) -> Entry:
        """A name with its versions.

        Raises:
            AdapterUnknown: there is none.
        """
        return self._state.entry(name)

    def entries(self) -> list[Entry]:
        """All names with their versions, in order."""
        return [entry for _, entry in sorted(self._state.entries.items())]

    def resolve(self, name: str, digest: str | None = None) -> Version:
        """A name's live version, or the one whose digest begins with `digest` (at least 4 digits).

        Raises:
            AdapterUnknown: no such name, no such version, or several.
        """
        return self._state.entry(name).find(digest)

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

        def change(state: State) -> Entry:
            self.store.open(version.digest)  # here, where nobody can collect it before it has its name
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
            return state.entries[name]

        return self._commit(change)

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

        def change(state: State) -> Version:
            entry = state.entry(name)
            digest = entry.find(to).digest if to is not None else entry.previous()
            if digest is None:
                fix = "`vllm-lora show` lists what there is; --to makes any of them live."
                raise AdapterUnknown(name, "has no earlier version than the live one", fix)
            state.entries[name] = entry.with_live(digest, Event(now(), "rollback", digest))
            return state.entries[name].live_version

        return self._commit(change)

    def set_traffic(self, name: str, percent: Mapping[str, int]) -> Entry:
        """Split a name's requests over versions: digest -> percent, 100 together; empty for the live one.

        Raises:
            AdapterUnknown: no such name or version.
            BadSetting: the percents do not make 100.
        """

        def change(state: State) -> Entry:
            entry = state.entry(name)
            split = {entry.find(digest).digest: share for digest, share in percent.items()}
            whole = all(type(share) is int and share >= 0 for share in split.values())
            if split and not (whole and sum(split.values()) == 100):
                raise BadSetting("traffic", "percents must be whole numbers that make 100", "Change them.")
            state.entries[name] = entry.with_traffic(split, Event(now(), "traffic", entry.live))
            return state.entries[name]

        return self._commit(change)

    def remove(self, names: Collection[str], forget_folders: Collection[str] = ()) -> None:
        """Take names out of service. Their folders are not taken again until they change.

        `forget_folders` are folders that are gone: should one come back, it is new.

        Raises:
            AdapterUnknown: a name is not there; nothing was changed.
        """

        def change(state: State) -> None:
            for name in names:
                del state.entries[state.entry(name).name]
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
        with self._writing:
            if self.base() != base:
                self._commit(lambda state: state.base.update(base))

    def record_proof(self, digest: str, kind: str, result: Mapping[str, Any]) -> None:
        """Keep what was proved of a version, beside the store, which is never written again."""
        self._commit(lambda state: state.proofs.setdefault(digest, {}).update({kind: dict(result)}))

    def collect(self) -> list[str]:
        """Remove from the store what no name needs and nobody leases; their digests."""
        with self._writing:  # or a version would go that gets its name back meanwhile
            self._must_write()
            return self.store.collect(self._saved.state.digests() | self._state.digests())

    # How it is kept.

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes in this block become one: on the disk at its end, or none of them if that fails.

        Other threads that write wait for its end; those that read see what was before it until then.
        """
        with self._writing:
            outer = self._draft
            self._draft = (threading.get_ident(), self._state)
            try:
                yield
                state = self._state
            finally:
                self._draft = outer
            self._keep(state)

    def _commit(self, change: Callable[[State], _T]) -> _T:
        with self._writing:
            state = self._state.copy()
            outcome = change(state)
            self._must_write()
            self._keep(state)
            return outcome

    def _must_write(self) -> StateLock:
        if self._lock is None:
            rule = "was opened for reading" if self.readonly else "was closed"
            raise StateLocked(str(self.state_dir), rule, "Open it for writing.")
        return self._lock

    def _keep(self, state: State) -> None:
        """Save a state, or leave that to the block around."""
        if self._draft is not None:
            self._draft = (threading.get_ident(), state)
        elif state is not self._saved.state:
            self._save(state)

    def _save(self, state: State) -> None:
        state.forget_proofs()
        failpoint("catalog.changed")
        try:
            # Once it is written whoever opens the file sees the change, so we do.
            self._saved = write_state(self.state_dir, self._saved.revision + 1, state)
            sync_folder(self.state_dir)
        except OSError as error:
            raise StoreFailed(STATE_FILE, error) from error
        failpoint("catalog.committed")

    def _sweep(self) -> None:
        sweep_partial(self.state_dir)
        self.store.sweep()
        shutil.rmtree(self.incoming, ignore_errors=True)


def now() -> str:
    """The time as the catalog notes it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
