"""A base model seen through its `config.json`: which modules it has, and of what shape.

Shapes come from the architecture's config and never from stored weights, so a
quantised base looks like the model that it was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from vllm_lora_ext.architectures import Architecture, Shape, describe
from vllm_lora_ext.errors import BadBaseModel
from vllm_lora_ext.files import read_whole
from vllm_lora_ext.spec import folder_name

# The fields that decide which adapters fit. Names and paths are left out on
# purpose: the same model has many of them.
_FINGERPRINT_FIELDS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)

_GIVE_A_FOLDER = "Give the folder that holds config.json, the weights and the tokenizer."
_MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class BaseModel:
    """`name` as the user wrote it, `config` as it stands in the model's `config.json`."""

    name: str
    config: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Digest of what decides whether an adapter fits: equal for a path and a hub id of one model.

        Of numbers as they are used, since one version of transformers writes out what another leaves to its
        defaults; of the config as it stands only where we do not know the architecture.
        """
        if self._architecture is not None:
            numbers = {"model_type": self.config["model_type"], **self._architecture.numbers}
            return _digest(numbers)
        fields = {name: self.config.get(name) for name in _FINGERPRINT_FIELDS}
        inner = self.config.get("text_config")
        if isinstance(inner, Mapping):  # a vision-language model: the language model's sizes stand in there
            fields["text_config"] = {name: inner.get(name) for name in _FINGERPRINT_FIELDS}
        return _digest(fields)

    @property
    def architectures(self) -> str:
        """The names of the model's classes, as its config gives them; empty if it does not."""
        names = self.config.get("architectures")
        return ", ".join(str(name) for name in names) if isinstance(names, list) else ""

    @property
    def public_name(self) -> str:
        """The hub id, or the last part of a folder's path: never a path."""
        return folder_name(Path(self.name)) if Path(self.name).is_dir() else self.name

    @cached_property
    def _architecture(self) -> Architecture | None:
        return describe(self.config)

    def module_shapes(self) -> dict[str, Shape] | None:
        """Linear modules as name -> (out_features, in_features); None for an unknown architecture.

        Names are those of transformers, for example `model.layers.0.self_attn.q_proj`. The language model
        inside a vision-language model has more than one: every name that vLLM takes is listed.
        """
        return dict(self._architecture.shapes) if self._architecture else None

    def is_unjudged(self, module: str) -> bool:
        """Whether the model has `module`, or may have it, and we do not claim to know its shape.

        So it is with experts and their router, vision tower and projector, embedding and head.
        """
        return self._architecture is not None and self._architecture.is_unjudged(module)

    def vocabulary_shapes(self) -> dict[str, Shape]:
        """Embedding and head as name -> (vocab_size, hidden_size), as their weights lie; empty if unknown."""
        if self._architecture is None or self._architecture.vocabulary is None:
            return {}
        return dict.fromkeys(sorted(self._architecture.vocabulary_names), self._architecture.vocabulary)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def read_base_model(name: str, offline: bool = False) -> BaseModel:
    """Read the config of a local folder or of a hub id (cached, else downloaded).

    With `offline`, nothing is asked of the network: a hub id has to be in the local cache.

    Raises:
        BadBaseModel: the folder is no model, or the hub id cannot be had.
    """
    path = _config_path(name, offline)
    try:
        config = json.loads(read_whole(path, _MAX_CONFIG_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadBaseModel(
            str(path), f"cannot be read as JSON ({error})", "Restore the model's config.json."
        ) from error
    if not isinstance(config, dict):
        raise BadBaseModel(str(path), "is not a JSON object", "Restore the model's config.json.")
    return BaseModel(name, config)


def _config_path(name: str, offline: bool) -> Path:
    folder = Path(name)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except OSError as error:  # a name that no file system takes
        raise BadBaseModel(name[:80], f"is no path ({error.strerror})", _GIVE_A_FOLDER) from error
    if is_folder:
        path = folder / "config.json"
        if not path.is_file():
            rule = "the folder holds no config.json, so it is not a model"
            raise BadBaseModel(name, rule, _GIVE_A_FOLDER)
        return path
    if exists or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadBaseModel(name, "no such folder", "Check the path of the base model.")
    return _config_from_hub(name, offline)


def _config_from_hub(name: str, offline: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download: Callable[..., str] = hf_hub_download
    if offline:
        download = partial(hf_hub_download, local_files_only=True)
    try:
        return Path(download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        source = "in the local cache" if offline else "a model the hub gave us"
        raise BadBaseModel(
            name,
            f"neither a folder here nor {source} ({type(error).__name__})",
            "Check the spelling, or download the model and give its folder.",
        ) from error
