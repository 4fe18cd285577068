"""The names and versions of a fleet, copied: what a node goes by that does not share the controller's folder.

The state file and every version that it names are fetched from the controller, a version by its digest, with
which it is compared before it has its name here. A new state file takes its place once its versions are here,
so whoever follows it (`followed.py`) finds what it names. Copies are looked after: what is not as it was
written is fetched again.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_lora_ext.background import lower_priority
from vllm_lora_ext.catalog import STORE_FOLDER
from vllm_lora_ext.errors import ServerUnreachable, StateLocked, VersionDamaged, VersionMissing
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.publishing import is_whole
from vllm_lora_ext.records import Version
from vllm_lora_ext.state_file import STATE_FILE, StateLock, read_state
from vllm_lora_ext.store import PROVENANCE_FILE, VERSION_FILE, AdapterStore

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

PIECE_BYTES = 4 << 20
_AT_ONCE = 4  # versions that are fetched side by side
_LOOK_EVERY_S = 10.0
_RETRY_S = 1.0
_ANSWER_S = 60.0  # for one question
_NEXT = "next"  # within a copy: the state file that comes, until its versions are here
_MOST_COPIES = 1024  # in one folder; each belongs to a replica


class Source(Protocol):
    """Where copies come from. Called from any thread; raises whatever stands against it."""

    def state_file(self, known: int) -> bytes | None:
        """The state file once its revision is another than `known`; None if that takes long."""

    def files(self, digest: str) -> list[str]:
        """The names of a version's files.

        Raises:
            VersionMissing, VersionDamaged: it is not there.
        """

    def piece(self, digest: str, name: str, offset: int) -> bytes:
        """At most PIECE_BYTES of a version's file from `offset` on, fewer at its end only.

        Raises:
            VersionMissing, VersionDamaged: as `files`.
        """


class FromController:
    """A `Source` over the handle of the controller; to be made in the event loop that the handle is for.

    Raises:
        ServerUnreachable: it does not answer. Errors of Ray's go on.
    """

    def __init__(self, controller: DeploymentHandle) -> None:
        self._controller, self._loop = controller, asyncio.get_running_loop()

    def state_file(self, known: int) -> bytes | None:
        """As `Source`."""
        data: bytes | None = self._ask("state_file", known)
        return data

    def files(self, digest: str) -> list[str]:
        """As `Source`."""
        return list(self._of(digest, self._ask("files", digest)))

    def piece(self, digest: str, name: str, offset: int) -> bytes:
        """As `Source`."""
        return bytes(self._of(digest, self._ask("piece", digest, name, offset)))

    def _of(self, digest: str, answer: Any) -> Any:
        if answer is None:
            raise VersionMissing(digest[:12])
        return answer

    def _ask(self, method: str, *arguments: Any) -> Any:
        async def ask() -> Any:
            try:
                return await asyncio.wait_for(getattr(self._controller, method).remote(*arguments), _ANSWER_S)
            except TimeoutError as error:  # which is an OSError, as those of the disk are
                raise ServerUnreachable("the controller", "does not answer") from error

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()


class Copy:
    """A copy in `folder`, kept up to date from `start` until `stop`. Without `versions` of the names only."""

    def __init__(self, folder: Path, source: Source, versions: bool = True) -> None:
        self.folder, self._source, self._with_versions = folder, source, versions
        self.store = AdapterStore(folder / STORE_FOLDER)
        self.store.sweep()
        (folder / _NEXT).mkdir(parents=True, exist_ok=True)
        self._revision = -1
        self._versions: dict[str, Version] = {}
        self._also_needed: Counter[str] = Counter()  # nor may these be dropped
        self._keeping = threading.Lock()
        self._verified: dict[str, list[list[int]]] = {}  # what the files looked like when they were compared
        self._stopped = threading.Event()

    def start(self) -> None:
        """Be up to date when this returns, and from then on.

        Raises:
            Exception: of the source, or StoreFailed.
        """
        self.update()
        works = [self._follow, self._look_after] if self._with_versions else [self._follow]
        for work in works:
            threading.Thread(target=work, name="copy", daemon=True).start()

    def stop(self) -> None:
        """Follow no more."""
        self._stopped.set()

    def update(self) -> None:
        """Wait a while for a change, and take it over."""
        data = self._source.state_file(self._revision)
        if data is None:
            return
        (self.folder / _NEXT / STATE_FILE).write_bytes(data)
        saved = read_state(self.folder / _NEXT)
        versions = {v.digest: v for entry in saved.state.entries.values() for v in entry.versions}
        with self._needing(versions.keys()):
            if self._with_versions:
                self._fetch_all([d for d, version in versions.items() if not is_whole(version, self.store)])
            (self.folder / _NEXT / STATE_FILE).rename(self.folder / STATE_FILE)
            self._versions, self._revision = versions, saved.revision

    @contextmanager
    def _needing(self, digests: Collection[str]) -> Iterator[None]:
        """Nobody drops these until the end of the block."""
        with self._keeping:
            self._also_needed.update(digests)
        try:
            yield
        finally:
            with self._keeping:
                self._also_needed -= Counter(digests)

    def _fetch_all(self, digests: list[str]) -> None:
        """All that can be had: one that the controller does not have whole keeps nothing from the others."""
        with ThreadPoolExecutor(_AT_ONCE, "copy-fetch") as pool:
            for digest, fetched in [(digest, pool.submit(self._fetch, digest)) for digest in digests]:
                try:
                    fetched.result()
                except (VersionMissing, VersionDamaged) as error:
                    logger.error("Version %s cannot be fetched: %s", digest[:12], error)

    def _fetch(self, digest: str) -> None:
        with self.store.copying(digest) as folder:
            for name in self._source.files(digest):
                self._fetch_file(digest, name, folder)
        self._verified[digest] = self.store.signature(digest)

    def _fetch_file(self, digest: str, name: str, folder: Path) -> None:
        size = 0
        with (folder / name).open("xb") as file:
            while piece := self._source.piece(digest, name, size):
                size += file.write(piece)
                if len(piece) < PIECE_BYTES:
                    break

    @contextmanager
    def holding(self, version: Version) -> Iterator[None]:
        """A version of the controller's store that no name may have yet, kept here for the time of the block.

        Raises:
            VersionMissing, VersionDamaged: the controller does not have it.
        """
        with self._needing([version.digest]):
            if not is_whole(version, self.store):
                self._fetch(version.digest)
            yield

    def _follow(self) -> None:
        while not self._stopped.is_set():
            self._try(self.update)

    def _look_after(self) -> None:
        """Compare what changed, or was here before; drop what no name has. It is no part of a change."""
        lower_priority()
        while not self._stopped.wait(_LOOK_EVERY_S):
            self._try(self.mend)
            self._try(self.tidy)

    def tidy(self) -> None:
        """Drop what no name has, and nobody is about to need."""
        with self._keeping:
            for digest in self.store.collect({*self._versions, *self._also_needed}):
                self._verified.pop(digest, None)

    def mend(self) -> None:
        """Fetch again what is not as it was written."""
        for digest in list(self._versions):
            if self.store.signature(digest) == self._verified.get(digest):
                continue
            try:
                self.store.verify(digest)
                self._verified[digest] = self.store.signature(digest)
            except (VersionMissing, VersionDamaged) as error:
                logger.warning("%s It is fetched again.", error)
                self._fetch_all([digest])

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # the controller is starting anew, or the disk is full
            logger.warning("The copy in %s is not up to date: %s", self.folder, error)
            self._stopped.wait(_RETRY_S)


def own_folder(root: Path) -> tuple[Path, StateLock]:
    """A folder within `root` that no other process has, and what keeps it so; one of before if there is any.

    Raises:
        BadSetting: it cannot be used.
        StateLocked: all of them are taken.
    """
    for number in range(_MOST_COPIES):
        folder = root / str(number)
        try:
            return folder, StateLock(folder)
        except StateLocked:
            continue
    raise StateLocked(str(root), f"has {_MOST_COPIES} copies in use", "Choose another --replica-state-dir.")


def file_names(store: AdapterStore, digest: str) -> list[str]:
    """As `Source.files`, of a store here."""
    return [VERSION_FILE, PROVENANCE_FILE, *store.open(digest).files]


def read_piece(store: AdapterStore, digest: str, name: str, offset: int) -> bytes:
    """As `Source.piece`, of a store here."""
    version = store.open(digest)
    try:
        with RegularFile(version.folder / name) as file:
            return file.read(max(0, min(PIECE_BYTES, file.size - offset)), offset)
    except (OSError, ValueError) as error:
        raise VersionDamaged(version.short, f"{name} cannot be read") from error
