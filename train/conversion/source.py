"""An adapter folder of any PEFT type, as it was saved: its config and its tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.conversion.pickles import tensors_from_pickle
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.files import read_whole
from vllm_lora_ext.peft_format import CONFIG_FILE, MAX_CONFIG_BYTES, PICKLES, WEIGHTS_FILE
from vllm_lora_ext.strict_json import JsonRefused, parse_object

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Source:
    """`tensors` by the names in the file; `is_pickle` where they came out of one."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    is_pickle: bool = False

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type"))


def full_model_advice(peft_type: str) -> str:
    """What else can be done with an adapter that no LoRA is equal to."""
    how = "`vllm-lora merge`" if peft_type == "LORA" else "PEFT's `merge_and_unload`"
    return f"Make a full model of it with {how}."


@contextmanager
def open_source(folder: Path) -> Iterator[Source]:
    """Read `folder`; while it is open its tensors may still lie in the file.

    Raises:
        BadInput: config or weights are missing, damaged, or hold what cannot be read.
    """
    config = read_config(folder)
    pickle = next((folder / name for name in PICKLES if (folder / name).exists()), None)
    with tempfile.TemporaryDirectory(prefix="vllm-lora-convert-") as place:
        weights = folder / WEIGHTS_FILE
        is_pickle = not weights.exists() and pickle is not None
        if is_pickle and pickle is not None:
            weights = Path(place) / WEIGHTS_FILE
            tensors_from_pickle(pickle, weights)
        yield Source(folder, config, _read_tensors(weights), is_pickle)


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        BadInput: it is missing or no JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        return parse_object(read_whole(path, MAX_CONFIG_BYTES))
    except FileNotFoundError:
        rule = f"has no {CONFIG_FILE}, so it is no PEFT adapter"
        raise BadInput(str(folder), rule, "Give the folder that PEFT saved.") from None
    except JsonRefused as error:
        raise BadInput(str(path), error.rule, "Save it with PEFT again.") from error
    except (OSError, ValueError) as error:
        raise BadInput(str(path), f"cannot be read ({error})", "Save it with PEFT again.") from error


def _read_tensors(weights: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(weights)
    except FileNotFoundError:
        rule = f"has neither {WEIGHTS_FILE} nor {' nor '.join(PICKLES)}"
        raise BadInput(str(weights.parent), rule, "Copy the weights, or save it with PEFT again.") from None
    except (OSError, SafetensorError) as error:
        rule = f"cannot be read ({error})"
        raise BadInput(str(weights), rule, "Copy it again, or save it with PEFT again.") from error
    return tensors
