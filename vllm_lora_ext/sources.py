"""Where adapters come from: folders here, and folders elsewhere that are fetched first.

`hf://org/repo[@revision]` goes through huggingface_hub; `s3://`, `gs://` and whatever else fsspec
knows go through fsspec. Only the files that make an adapter are fetched.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadSetting, MissingPackage
from vllm_lora_ext.inspection import SOURCE_FILES
from vllm_lora_ext.peft_format import CONFIG_FILE, MAX_WEIGHTS_BYTES, adapter_folders, public_name

_HUB = "hf://"


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
        return f"{self.name}={self.path if self.folder is None else self.folder.absolute()}"


def find_sources(values: Sequence[str]) -> list[AdapterSource]:
    """The adapters behind values of `--adapters`: a folder of adapters, an adapter, or name=path-or-URL.

    Raises:
        BadSetting: a folder is absent.
    """
    sources = []
    for value in values:
        whole = expanded(value)
        name, separator, path = value.partition("=")
        if "://" in value.partition("=")[0]:
            sources.append(AdapterSource(value.rstrip("/").rpartition("/")[2].partition("@")[0], value))
        elif separator and not whole.exists():
            place = path if "://" in path else str(_existing(expanded(path)))
            sources.append(AdapterSource(name, place))
        else:
            folders = adapter_folders(_existing(whole))
            sources += [AdapterSource(name, str(folder)) for name, folder in folders.items()]
    return sources


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
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=scratch) as temporary:
        target = Path(temporary) / public_name(Path(source.name))
        target.mkdir()
        if source.path.startswith(_HUB):
            yield _from_hub(source.path, target)
        else:
            yield _by_fsspec(source.path, target)


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
                if (size := system.size(f"{root}/{name}") or 0) > MAX_WEIGHTS_BYTES:
                    raise BadSetting(f"{url}/{name}", f"has {size} bytes, too many", "Check the URL.")
                with system.open(f"{root}/{name}", "rb") as remote, (target / name).open("xb") as local:
                    shutil.copyfileobj(remote, local, 1 << 20)
    except OSError as error:
        rule = f"cannot be fetched ({error.strerror or type(error).__name__})"
        raise BadSetting(url, rule, "Check the URL, the network and your credentials.") from error
    return target
