"""Where adapters come from: folders here, and folders elsewhere that are fetched first.

`hf://org/repo[@revision]` goes through huggingface_hub; `s3://`, `gs://` and whatever else fsspec
knows go through fsspec. Only the files that make an adapter are fetched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vllm_lora_ext.errors import BadSetting, MissingPackage, StoreFailed
from vllm_lora_ext.inspection import SOURCE_FILES
from vllm_lora_ext.peft_format import CONFIG_FILE, MAX_WEIGHTS_BYTES, adapter_folders

_HUB = "hf://"
_SCHEMES = ("hf", "s3", "gs", "memory")  # what may be fetched; `memory` is fsspec's, for tests


@dataclass(frozen=True)
class AdapterSource:
    """Where an adapter comes from.

    `path` is a folder or a URL; `options` are what else was stated with vLLM's `--lora-modules`, by the
    names of its `LoRAModulePath`.
    """

    name: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched."""
        return "://" in self.path

    @property
    def folder(self) -> Path | None:
        """The adapter's folder; None for a URL."""
        return None if self.is_remote else expanded(self.path)

    @property
    def key(self) -> str:
        """What the catalog remembers it by: the place, whatever way leads there, and the name."""
        if self.folder is None:
            return f"{self.name}={self.path}"
        # A link in the folder may change where it leads; the folder it lies in is always the same.
        key = f"{self.name}={os.path.realpath(self.folder.parent)}/{self.folder.name}"
        return os.fsencode(key).decode("utf-8", "backslashreplace")


def find_sources(values: Sequence[str]) -> list[AdapterSource]:
    """The adapters behind values of `--adapters`: a folder of adapters, an adapter, or name=path-or-URL.

    Raises:
        BadSetting: a folder is absent.
    """
    sources = []
    for value in values:
        name, place = name_and_place(value)
        if "://" in place:
            last = place.partition("@")[0].rstrip("/").rpartition("/")[2]
            sources.append(AdapterSource(name or last, place))
        elif name is not None:
            sources.append(AdapterSource(name, str(_existing(Path(place)))))
        else:
            folders = _listed(_existing(Path(place)))
            sources += [AdapterSource(name, str(folder)) for name, folder in folders.items()]
    return sources


def name_and_place(value: str) -> tuple[str | None, str]:
    """A value of `--adapters` as the name it states, if any, and the folder or URL."""
    name, separator, path = value.partition("=")
    if "://" in name:
        return None, value
    if not separator or _exists(expanded(value)):
        return None, str(expanded(value))
    return name, path if "://" in path else str(expanded(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _listed(folder: Path) -> dict[str, Path]:
    try:
        return adapter_folders(folder)
    except OSError as error:  # which must not look like an empty folder: its names would retire
        rule = f"cannot be looked into ({error.strerror})"
        raise BadSetting(str(folder), rule, "Check its permissions and the disk.") from error


def stated_module(name: str, path: str, options: Mapping[str, Any]) -> AdapterSource:
    """One of vLLM's `--lora-modules`, whose path may be a hub id."""
    folder = expanded(path)
    is_hub_id = not folder.exists() and not path.startswith((".", "/", "~")) and path.count("/") == 1
    return AdapterSource(name, _HUB + path if is_hub_id and "://" not in path else path, options)


def expanded(path: str) -> Path:
    """The path with `~` written out."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # there is no such user
        return Path(path)


def _existing(path: Path) -> Path:
    if not path.is_dir():
        raise BadSetting(
            str(path),
            "no such folder of adapters",
            "Check the path, or make the folder: an empty one is fine with --base-model.",
        )
    return path


@contextmanager
def fetched(source: AdapterSource, scratch: Path) -> Iterator[Path]:
    """The folder of a source, fetched into `scratch` if it is elsewhere, for the time of the block.

    Raises:
        BadSetting: it cannot be had.
        MissingPackage: the package for this kind of URL is not installed.
    """
    if source.folder is not None:
        yield source.folder
        return
    scheme = source.path.partition("://")[0]
    if scheme not in _SCHEMES:
        raise BadSetting(
            source.path, f"is no place to fetch from ({scheme})", "Give a folder, hf://, s3:// or gs://."
        )
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        target = Path(tempfile.mkdtemp(dir=scratch))
    except OSError as error:
        raise StoreFailed(str(scratch), error) from error
    try:
        yield _from_hub(source.path, target) if scheme == "hf" else _by_fsspec(source.path, target)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _from_hub(url: str, target: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = url.removeprefix(_HUB).partition("@")
    try:
        found = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(SOURCE_FILES), cache_dir=target / "hub"
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        rule = f"cannot be fetched ({type(error).__name__})"
        raise BadSetting(
            url, rule, "Check the spelling, the network, and HF_TOKEN for a private one."
        ) from error
    return Path(found)


def _by_fsspec(url: str, target: Path) -> Path:
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise MissingPackage(
            url.partition("://")[0], str(error).rstrip("."), "Install it with pip."
        ) from error
    except ValueError as error:
        raise BadSetting(url, str(error).rstrip("."), "Give a folder, or a URL that fsspec knows.") from error
    try:
        if not system.exists(f"{root}/{CONFIG_FILE}"):
            raise BadSetting(url, f"holds no {CONFIG_FILE}", "Check the URL.")
        for name in SOURCE_FILES:
            if system.exists(f"{root}/{name}"):
                with system.open(f"{root}/{name}", "rb") as remote, (target / name).open("xb") as local:
                    _copy(remote, local, f"{url}/{name}")
    except BadSetting:
        raise
    except Exception as error:  # each library that fetches has errors of its own, for credentials above all
        rule = f"cannot be fetched ({type(error).__name__})"
        raise BadSetting(url, rule, "Check the URL, the network and your credentials.") from error
    return target


def _copy(remote: BinaryIO, local: BinaryIO, url: str) -> None:
    left = MAX_WEIGHTS_BYTES
    while piece := remote.read(1 << 20):
        left -= len(piece)
        if left < 0:
            raise BadSetting(url, f"has more than {MAX_WEIGHTS_BYTES} bytes", "Check the URL.")
        local.write(piece)
