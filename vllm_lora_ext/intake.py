"""An adapter folder becomes a stored version: read once, judged, normalised, written.

Between the judgement and the copy a folder can change. So the bytes that are judged are the bytes that
are written: the header is compared again in the file that is then read, and whoever writes to it
meanwhile is told to publish again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from vllm_lora_ext.admission import refused
from vllm_lora_ext.chat_override import AS_IT_IS, ChatOverride
from vllm_lora_ext.contract import read_provenance, stated_digests
from vllm_lora_ext.errors import AdapterRefused, BadInput
from vllm_lora_ext.failpoints import failpoint
from vllm_lora_ext.files import ReadFailed, RegularFile, read_whole
from vllm_lora_ext.inspection import (
    SOURCE_FILES,
    Inspection,
    Rules,
    inspect_adapter,
    judge_chat,
    judge_digests,
    kept_places,
    require_admitted,
    source_signature,
)
from vllm_lora_ext.peft_format import CONFIG_FILE, WEIGHTS_FILE, canonical_config, file_finding, fold
from vllm_lora_ext.spec import Finding
from vllm_lora_ext.store import AdapterStore, Staging, StoredVersion
from vllm_lora_ext.strict_json import canonical
from vllm_lora_ext.tensor_file import HeaderRefused, TensorPlace, canonical_header, read_header
from vllm_lora_ext.values import judge_values, read_values

_MAX_CHAT_BYTES = 64 << 20


@dataclass(frozen=True)
class Admitted:
    """A stored version, what was said about it, and the digest of what it was made of.

    That is the folder's files and what was stated of its chat settings.
    """

    version: StoredVersion
    inspection: Inspection
    source_digest: str


def admit(
    path: Path,
    store: AdapterStore,
    rules: Rules | None = None,
    name: str | None = None,
    looked_at: Inspection | None = None,
    chat: ChatOverride = AS_IT_IS,
) -> Admitted:
    """Judge the adapter in `path` and put it into `store`.

    The store holds every byte on the disk when this returns; a version that is there already is kept.
    What is stated in `chat` stands in the place of the folder's chat settings. `looked_at` is an inspection
    by the same rules and of the same `chat`, used if nothing was written to the folder since.

    Raises:
        AdapterRefused: with every finding; nothing is left in the store.
        StoreFailed: it could not be written; nothing is left in the store.
    """
    rules = rules or Rules()
    inspection = looked_at
    if inspection is None or inspection.path != path or inspection.signature != source_signature(path):
        inspection = inspect_adapter(path, rules, name, stated=chat)
    if looked_at is inspection:  # whose template was left for now
        inspection = inspection.with_findings(judge_chat(inspection.chat, rules))
    spec = require_admitted(inspection)
    try:
        stated = stated_digests(path, rules.follow_links)
        provenance = read_provenance(path, rules.follow_links)
    except BadInput as error:
        if "chat_settings_invalid" not in rules.allow:  # it was fine a moment ago
            raise AdapterRefused(inspection.name, [_changed(error.item)]) from error
        stated, provenance = {}, {}
    with store.stage() as staging:
        copied = _copy_weights(inspection, staging, rules)
        findings = judge_values(spec, copied.peaks)
        findings += judge_digests(path, stated, rules.follow_links, {WEIGHTS_FILE: copied.source_sha256})
        if source_signature(path) != inspection.signature:
            findings.append(_changed(inspection.name))
        inspection = inspection.with_findings(fold(findings), rules.allow)
        if refused(inspection.findings):
            raise AdapterRefused(inspection.name, inspection.findings)
        staging.add(CONFIG_FILE, canonical(canonical_config(spec)))
        source_digest = _source_digest(inspection, copied.source_sha256, rules, chat)
        noted = {
            "identity": provenance,
            "template": inspection.chat.state,
            "base_model": spec.base_model,
            "source_sha256": source_digest,
        }
        version = store.seal(staging, inspection.chat, noted)
    return Admitted(version, inspection, source_digest)


@dataclass(frozen=True)
class _Copied:
    peaks: dict[str, float]
    source_sha256: str


def _copy_weights(inspection: Inspection, staging: Staging, rules: Rules) -> _Copied:
    """Write the canonical weights file; the largest values, and the SHA-256 of the file that was read."""
    try:
        with RegularFile(inspection.path / WEIGHTS_FILE, rules.follow_links) as source:
            if read_header(source) != inspection.places:
                raise HeaderRefused("changed_while_reading", "has another header")
            with (staging.folder / WEIGHTS_FILE).open("xb", buffering=0) as target:
                copier = _Copier(source, target, kept_places(inspection), inspection.places)
                return copier.copy(staging)
    except (ReadFailed, FileNotFoundError, PermissionError, ValueError) as error:
        raise AdapterRefused(inspection.name, [file_finding(error, WEIGHTS_FILE)]) from error


class _Copier:
    """One pass from a checked file to its canonical form, with the digests of both."""

    def __init__(
        self, source: RegularFile, target: Any, kept: Sequence[TensorPlace], all_places: Sequence[TensorPlace]
    ) -> None:
        self._source, self._target = source, target
        specs = {place.spec.name: place.spec for place in kept}
        self._header, order = canonical_header(specs)
        by_name = {place.spec.name: place for place in kept}
        self._places = [by_name[name] for name in order]
        start = min(place.offset for place in all_places)
        self._source_header = source.read(start)
        # Files of the safetensors library are in this order already; only then one pass is enough for both.
        self._in_order = self._places == list(all_places)

    def copy(self, staging: Staging) -> _Copied:
        """Raises ValueError when the source is changed meanwhile."""
        same = self._in_order and self._header == self._source_header
        if same and self._source.clone_into(self._target.fileno()):
            return self._read_clone(staging)
        ours, theirs = hashlib.sha256(self._header), hashlib.sha256(self._source_header)

        def sink(piece: memoryview) -> None:
            ours.update(piece)
            if self._in_order and not same:
                theirs.update(piece)
            _write_all(self._target, piece)

        _write_all(self._target, memoryview(self._header))
        peaks = read_values(self._source, self._places, sink)
        self._save(staging, ours.hexdigest())
        if same:
            return _Copied(peaks, ours.hexdigest())
        if not self._in_order:
            self._hash_rest(theirs)
        return _Copied(peaks, theirs.hexdigest())

    def _read_clone(self, staging: Staging) -> _Copied:
        """The target is a picture of the source at one moment; what is judged is read from it."""
        digest = hashlib.sha256(self._header)
        with RegularFile(staging.folder / WEIGHTS_FILE) as picture:
            if picture.size != self._source.size or picture.read(len(self._header)) != self._header:
                raise ValueError(f"{WEIGHTS_FILE} changed while it was read")
            peaks = read_values(picture, self._places, digest.update)
        self._save(staging, digest.hexdigest())
        return _Copied(peaks, digest.hexdigest())

    def _save(self, staging: Staging, digest: str) -> None:
        failpoint("store.weights_written")
        os.fsync(self._target.fileno())
        staging.files[WEIGHTS_FILE] = digest

    def _hash_rest(self, digest: Any) -> None:
        start = len(self._source_header)
        while start < self._source.size:
            piece = self._source.read(min(1 << 20, self._source.size - start), start)
            digest.update(piece)
            start += len(piece)


def _write_all(target: BinaryIO, data: memoryview) -> None:
    while len(data):
        data = data[target.write(data) :]


def _source_digest(inspection: Inspection, weights_sha256: str, rules: Rules, chat: ChatOverride) -> str:
    """The digest of the adapter's files as they came, so that a folder is taken only when it changes.

    What is stated of its chat settings counts like one more file.
    """
    files = {WEIGHTS_FILE: weights_sha256}
    if chat.digest:
        files["stated chat settings"] = chat.digest
    for name in SOURCE_FILES:
        if name != WEIGHTS_FILE:
            try:
                data = read_whole(inspection.path / name, _MAX_CHAT_BYTES, rules.follow_links)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise AdapterRefused(inspection.name, [file_finding(error, name)]) from error
            files[name] = hashlib.sha256(data).hexdigest()
    return hashlib.sha256(canonical(files)).hexdigest()


def _changed(item: str) -> Finding:
    return file_finding(ValueError(), item)
