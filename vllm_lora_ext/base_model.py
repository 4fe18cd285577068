"""A base model seen through its `config.json`: which modules it has, and of what shape.

Shapes come from the architecture's config and never from stored weights, so a
quantised base looks like the model that it was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadBaseModel
from vllm_lora_ext.spec import folder_name

# Decoders that share Llama's module names and shapes (transformers, modeling_llama.py).
LLAMA_LIKE = frozenset({"llama", "mistral", "qwen2", "qwen3"})

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


@dataclass(frozen=True)
class BaseModel:
    """`name` as the user wrote it, `config` as it stands in the model's `config.json`."""

    name: str
    config: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Digest of what decides whether an adapter fits: equal for a path and a hub id of one model."""
        fields = {name: self.config.get(name) for name in _FINGERPRINT_FIELDS}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def public_name(self) -> str:
        """The hub id, or the last part of a folder's path: never a path."""
        return folder_name(Path(self.name)) if Path(self.name).is_dir() else self.name

    def module_shapes(self) -> dict[str, tuple[int, int]] | None:
        """Linear modules as name -> (out_features, in_features); None for an unknown architecture.

        Names are those of transformers, for example `model.layers.0.self_attn.q_proj`.
        """
        config = self.config
        if config.get("model_type") not in tuple(LLAMA_LIKE):
            return None
        try:
            hidden = int(config["hidden_size"])
            mlp = int(config["intermediate_size"])
            heads = int(config["num_attention_heads"])
            layers = int(config["num_hidden_layers"])
            kv_heads = int(config.get("num_key_value_heads") or heads)
            head_dim = int(config.get("head_dim") or hidden // heads)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return None
        shapes = {
            "self_attn.q_proj": (heads * head_dim, hidden),
            "self_attn.k_proj": (kv_heads * head_dim, hidden),
            "self_attn.v_proj": (kv_heads * head_dim, hidden),
            "self_attn.o_proj": (hidden, heads * head_dim),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        return {
            f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()
        }


def read_base_model(name: str) -> BaseModel:
    """Read the config of a local folder or of a hub id (cached, else downloaded).

    Raises:
        BadBaseModel: the folder is no model, or the hub id cannot be had.
    """
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
    elif exists or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BadBaseModel(name, "no such folder", "Check the path of the base model.")
    else:
        path = _config_from_hub(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadBaseModel(
            str(path), f"cannot be read as JSON ({error})", "Restore the model's config.json."
        ) from error
    if not isinstance(config, dict):
        raise BadBaseModel(str(path), "is not a JSON object", "Restore the model's config.json.")
    return BaseModel(name, config)


def _config_from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadBaseModel(
            name,
            f"neither a folder here nor a model the hub gave us ({type(error).__name__})",
            "Check the spelling, or download the model and give its folder.",
        ) from error
