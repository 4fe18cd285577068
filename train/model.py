"""The base model: where it runs, in which dtype, and how much of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadInput

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a CPU is asked for before bfloat16 is worth it (torch.cpu.get_capabilities): without one of these
# torch computes in float32 all the same, and converts before and after.
_BF16_ON_CPU = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers are trained, and how many the base has, which is what full fine-tuning trains."""

    trained: int
    base: int

    def __str__(self) -> str:
        share = self.trained / self.base
        return f"{self.trained:,} trainable parameters, {share:.2%} of the base's {self.base:,}"


def training_dtype(dtype: str) -> torch.dtype:
    """The dtype that `--dtype` means on this machine.

    For `auto` on a CPU this is float32, so that an answer does not depend on which CPU gave it; what a
    training run holds its base in is `train.methods.base_dtype`.
    """
    import torch

    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def cpu_computes_in_bf16() -> bool:
    """Whether the CPU has instructions for bfloat16; False where torch cannot tell."""
    import torch

    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in _BF16_ON_CPU)


def stored_dtype(base_model: str) -> torch.dtype:
    """The dtype that the base's own weights are stored in, float32 where its config does not say."""
    import torch
    from transformers import AutoConfig

    dtype = AutoConfig.from_pretrained(base_model).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_tokenizer(base_model: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer.

    Raises:
        BadBaseModel: the base is no model, or has no tokenizer.
    """
    from transformers import AutoTokenizer

    read_base_model(base_model)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base_model)
    except Exception as error:  # transformers lets through whatever damaged files cause
        raise BadBaseModel(
            base_model,
            f"its tokenizer cannot be loaded ({first_line(error)})",
            "Restore its files.",
        ) from error
    if tokenizer.eos_token_id is None:
        raise BadBaseModel(
            base_model, "its tokenizer has no end token", "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def load_base(base_model: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """The base model on the GPU if torch sees one, else on the CPU; `options` go to `from_pretrained`.

    Raises:
        BadBaseModel: its weights cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype, **options)
    except Exception as error:  # as above
        raise BadBaseModel(
            base_model, f"cannot be loaded ({first_line(error)})", "Restore its files."
        ) from error
    return model.to(device)


def attach_adapter(model: PreTrainedModel, adapter_dir: Path) -> PeftModel:
    """The base with a trained adapter on it.

    Raises:
        BadInput: PEFT cannot load the folder.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter_dir))
    except Exception as error:  # PEFT lets through whatever damaged files cause
        rule = f"PEFT cannot load it ({first_line(error)})"
        raise BadInput(str(adapter_dir), rule, "Save it with PEFT again.") from error


def first_line(error: Exception) -> str:
    """The first line of somebody else's error, which may go on for pages."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
