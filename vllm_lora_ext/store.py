"""The store: every version of every adapter, by its digest, written once and never again.

    <root>/<sha256>/version.json               what the digest is of: digests of the files, chat settings
                    adapter_config.json        canonical
                    adapter_model.safetensors  canonical: own tensors only, in one order
                    chat_template.jinja        if it brings one
                    provenance.json            where it came from; no part of the digest

The engine reads here and nowhere else, so what happens to a tenant's own files cannot reach it. A
folder has its name only once everything in it is on the disk; what a crash leaves behind has a hidden
name and is swept away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from vllm_lora_ext.contract import TEMPLATE_FILE, ChatSettings
from vllm_lora_ext.errors import StoreFailed, VersionDamaged, VersionMissing
from vllm_lora_ext.failpoints import failpoint
from vllm_lora_ext.files import (
    RegularFile,
    lock_file,
    read_whole,
    signature,
    sync_file,
    sync_folder,
    write_new,
)
from vllm_lora_ext.peft_format import CONFIG_FILE, WEIGHTS_FILE
from vllm_lora_ext.strict_json import canonical, parse_object

VERSION_FILE, PROVENANCE_FILE = "version.json", "provenance.json"
VERSION_FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_JSON_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredVersion:
    """One version in the store. `files` are the SHA-256 digests of what the digest covers.

    One that was just stored is leased while this object lives, until `release`: no name has it yet.
    """

    digest: str
    folder: Path
    files: Mapping[str, str]
    chat: ChatSettings
    hold: BinaryIO | None = field(default=None, repr=False, compare=False)

    def release(self) -> None:
        """Let it be collected, if no name has it by now."""
        if self.hold is not None:
            self.hold.close()

    @property
    def short(self) -> str:
        """The first 12 digits, as users meet them: `name@3f2a9c14d0b7`."""
        return self.digest[:12]


class Staging:
    """A version while it is written: a hidden folder, and the digests of what is in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}

    def add(self, name: str, data: bytes) -> None:
        """Write one whole file."""
        write_new(self.folder / name, data)
        self.files[name] = hashlib.sha256(data).hexdigest()


class AdapterStore:
    """Versions by digest under `root`. Many may read; one at a time may add and collect (see `Catalog`)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextmanager
    def stage(self) -> Iterator[Staging]:
        """A place to write a version in; gone at the end unless `seal` gave it its name.

        Raises:
            StoreFailed: it could not be written; nothing of the version is left.
        """
        folder = self.root / f".{uuid.uuid4().hex}.partial"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            failpoint("store.staged")
            yield Staging(folder)
        except OSError as error:
            raise StoreFailed(str(self.root), error) from error
        finally:
            if folder.exists():
                _remove(folder)

    def seal(self, staging: Staging, chat: ChatSettings, provenance: Mapping[str, Any]) -> StoredVersion:
        """Give a staged version its digest and its name; the one that is there already stays if it is equal.

        When this returns, the version survives a loss of power.
        """
        if chat.template is not None:
            staging.add(TEMPLATE_FILE, chat.template.encode())
        body = {"format": VERSION_FORMAT, "files": staging.files, "chat": chat.canonical()}
        version = canonical(body)
        digest = hashlib.sha256(version).hexdigest()
        write_new(staging.folder / VERSION_FILE, version)
        write_new(staging.folder / PROVENANCE_FILE, canonical(dict(provenance)))
        sync_folder(staging.folder)
        failpoint("store.written")
        hold = self._hold_whole(digest)
        if hold is None:
            with self._naming():  # two folders of one content: the second finds the first's version
                hold = self._hold_whole(digest) or self._give_name(staging, digest)
        failpoint("store.synced")
        return replace(self.open(digest), hold=hold)

    @contextmanager
    def copying(self, digest: str) -> Iterator[Path]:
        """A folder to put the files of a version of another store in; at the end of the block it is compared
        with its digest, byte for byte, and is a version here. It takes the place of a damaged one.

        Raises:
            VersionDamaged, VersionMissing: what the folder holds is not that version; nothing of it is left.
            StoreFailed: it could not be written.
        """
        with self.stage() as staging:
            yield staging.folder
            _compare(open_version(staging.folder, digest))
            for file in staging.folder.iterdir():
                sync_file(file)
            sync_folder(staging.folder)
            with self._naming():
                hold = self._hold_whole(digest) or self._give_name(staging, digest)
            hold.close()

    def _give_name(self, staging: Staging, digest: str) -> BinaryIO:
        hold = _held(staging.folder)
        _make_read_only(staging.folder)
        self._discard(digest)  # a damaged one gives way
        staging.folder.rename(self.root / digest)
        failpoint("store.renamed")
        sync_folder(self.root)
        return hold

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """One at a time gives names, over all threads and processes."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            lock_file(folder, wait=True)
            yield
        finally:
            os.close(folder)

    def has(self, digest: str) -> bool:
        """Whether a version is there with all its files. Reads no weights; `verify` does."""
        try:
            version = self.open(digest)
            return all((version.folder / name).is_file() for name in version.files)
        except (VersionMissing, VersionDamaged):
            return False

    def open(self, digest: str) -> StoredVersion:
        """A version by its full digest; its weights are not read.

        Raises:
            VersionMissing: it is not there.
            VersionDamaged: what describes it was changed.
        """
        if not _DIGEST.fullmatch(digest):
            raise VersionMissing(digest[:64])
        return open_version(self.root / digest)

    def verify(self, digest: str) -> StoredVersion:
        """As `open`, with every byte compared with the digest.

        Raises:
            VersionMissing, VersionDamaged: as `open`, and for any file that is not as it was written.
        """
        version = self.open(digest)
        _compare(version)
        return version

    def signature(self, digest: str) -> list[list[int]]:
        """Sizes, times and inodes of a version's files, to notice a change without reading them."""
        folder = self.root / digest
        return [list(signature(folder / name) or ()) for name in (CONFIG_FILE, WEIGHTS_FILE, VERSION_FILE)]

    def provenance(self, digest: str) -> dict[str, Any]:
        """What was noted when the version was first stored."""
        with contextlib.suppress(OSError, ValueError):
            return parse_object(read_whole(self.root / digest / PROVENANCE_FILE, _MAX_JSON_BYTES))
        return {}

    @contextmanager
    def lease(self, digest: str) -> Iterator[StoredVersion]:
        """Keep a version from being collected, in this process and in all others, until the end of the block.

        A shared lock on its `version.json`, which ends with the process that holds it.

        Raises:
            VersionMissing, VersionDamaged: as `open`.
        """
        try:
            hold = _held(self.root / digest)
        except OSError as error:
            raise VersionMissing(digest[:12]) from error
        with hold:
            yield self.open(digest)  # it may have been collected between opening and locking

    def digests(self) -> set[str]:
        """All versions that have a name here."""
        if not self.root.is_dir():
            return set()
        return {entry.name for entry in self.root.iterdir() if _DIGEST.fullmatch(entry.name)}

    def collect(self, needed: Collection[str]) -> list[str]:
        """Remove every version that is not `needed` and not leased; returns their digests."""
        collected = []
        failpoint("collect.begun")
        for digest in sorted(self.digests() - set(needed)):
            with self._unleased(digest) as is_free:
                if is_free:
                    self._discard(digest)
                    collected.append(digest)
        return collected

    @contextmanager
    def _unleased(self, digest: str) -> Iterator[bool]:
        """Whether nobody leases a version, and nobody can until the end of the block."""
        try:
            file = (self.root / digest / VERSION_FILE).open("rb")
        except OSError:
            yield True  # damaged: nobody can have leased it
            return
        with file:
            yield lock_file(file.fileno())

    def _discard(self, digest: str) -> None:
        """Take a version's name away first, so that nobody finds half of it."""
        trash = self.root / f".{digest}.{uuid.uuid4().hex[:8]}.trash"
        try:
            (self.root / digest).rename(trash)
        except OSError:  # it is not there, or stays until the next time
            return
        failpoint("collect.moved")
        _remove(trash)
        failpoint("collect.removed")

    def sweep(self) -> None:
        """Remove what a crash left behind. For the one that may write, before it does."""
        if self.root.is_dir():
            for entry in self.root.iterdir():
                if entry.name.startswith(".") and entry.suffix in (".partial", ".trash"):
                    _remove(entry)

    def _hold_whole(self, digest: str) -> BinaryIO | None:
        """A lease on a version that is there, byte for byte; None if it is not."""
        hold = None
        try:
            hold = _held(self.root / digest)
            self.verify(digest)
        except (OSError, VersionMissing, VersionDamaged):
            if hold is not None:
                hold.close()
            return None
        return hold


def _held(folder: Path) -> BinaryIO:
    """A version's `version.json`, open and locked: a lease until it is closed.

    Raises:
        OSError: it is not there, or was taken away before it was locked.
    """
    file = (folder / VERSION_FILE).open("rb")
    lock_file(file.fileno(), shared=True, wait=True)
    try:
        if os.fstat(file.fileno()).st_ino == (folder / VERSION_FILE).stat().st_ino:
            return file
    except OSError:
        file.close()
        raise
    file.close()  # a damaged version gave way to a whole one
    return _held(folder)


def is_version_folder(folder: Path) -> bool:
    """Whether a folder's name is a digest, so that its content has to agree with it."""
    return _DIGEST.fullmatch(folder.name) is not None


def open_version(folder: Path, digest: str | None = None) -> StoredVersion:
    """The version in a folder of a store, which is called as its digest; raises as `AdapterStore.open`."""
    digest = digest or folder.name
    try:
        version = read_whole(folder / VERSION_FILE, _MAX_JSON_BYTES)
    except FileNotFoundError as error:
        if folder.is_dir():
            raise VersionDamaged(digest[:12], f"{VERSION_FILE} is gone") from error
        raise VersionMissing(digest[:12]) from error
    except (OSError, ValueError) as error:
        raise VersionDamaged(digest[:12], f"{VERSION_FILE} cannot be read") from error
    if hashlib.sha256(version).hexdigest() != digest:
        raise VersionDamaged(digest[:12], f"{VERSION_FILE} is not as it was written")
    body = parse_object(version)
    if body["format"] != VERSION_FORMAT:
        raise VersionDamaged(digest[:12], f"it is of format {body['format']}, from another vllm-lora")
    return StoredVersion(digest, folder, body["files"], _read_chat(folder, digest, body))


def _read_chat(folder: Path, digest: str, body: Mapping[str, Any]) -> ChatSettings:
    chat, template = body["chat"], None
    if chat["template_sha256"] is not None:
        try:
            data = read_whole(folder / TEMPLATE_FILE, _MAX_JSON_BYTES)
        except (OSError, ValueError) as error:
            raise VersionDamaged(digest[:12], f"{TEMPLATE_FILE} cannot be read") from error
        if hashlib.sha256(data).hexdigest() != chat["template_sha256"]:
            raise VersionDamaged(digest[:12], f"{TEMPLATE_FILE} is not as it was written")
        template = data.decode()
    return ChatSettings(template, False, chat["system_prompt"], tuple(chat["stop"]), chat["sampling"])


def _compare(version: StoredVersion) -> None:
    """Raises VersionDamaged for a file that is not what the digest says."""
    for name, expected in version.files.items():
        if _file_digest(version.folder / name) != expected:
            raise VersionDamaged(version.short, f"{name} is not as it was written")


def _file_digest(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with RegularFile(path) as file:
            buffer = bytearray(1 << 20)
            for start in range(0, file.size, len(buffer)):
                piece = memoryview(buffer)[: min(len(buffer), file.size - start)]
                file.fill(piece, start)
                digest.update(piece)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def _make_read_only(folder: Path) -> None:
    for entry in folder.iterdir():
        entry.chmod(0o444)
    folder.chmod(0o555)


def _remove(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)
