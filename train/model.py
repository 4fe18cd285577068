"""The base model and its adapter: where it runs, in which dtype, and how much of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import TrainConfig
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadInput, BadSetting

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ParameterCount:
    """How many numbers are trained, and how many the base has."""

    trained: int
    base: int

    def __str__(self) -> str:
        share = self.trained / self.base
        return f"{self.trained:,} trainable parameters, {share:.2%} of the base's {self.base:,}"


def training_dtype(dtype: str) -> torch.dtype:
    """The dtype that `--dtype` means on this machine."""
    import torch

    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


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
            f"its tokenizer cannot be loaded ({_first_line(error)})",
            "Restore its files.",
        ) from error
    if tokenizer.eos_token_id is None:
        raise BadBaseModel(
            base_model, "its tokenizer has no end token", "Set eos_token in tokenizer_config.json."
        )
    return tokenizer


def load_base(base_model: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base model on the GPU if torch sees one, else on the CPU.

    Raises:
        BadBaseModel: its weights cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype)
    except Exception as error:  # as above
        raise BadBaseModel(
            base_model, f"cannot be loaded ({_first_line(error)})", "Restore its files."
        ) from error
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device)


def add_adapter(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Freeze the base and put a fresh LoRA on the target modules.

    Raises:
        BadSetting: no module of the base has one of the names.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=int(config.lora_alpha) if config.lora_alpha.is_integer() else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise BadSetting(
            f"--target-modules {' '.join(config.target_modules)}",
            f"do not fit this base ({_first_line(error)})",
            "Name linear modules of the base, for example q_proj v_proj.",
        ) from error


def attach_adapter(model: PreTrainedModel, adapter_dir: Path) -> PeftModel:
    """The base with a trained adapter on it.

    Raises:
        BadInput: PEFT cannot load the folder.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter_dir))
    except Exception as error:  # PEFT lets through whatever damaged files cause
        rule = f"PEFT cannot load it ({_first_line(error)})"
        raise BadInput(str(adapter_dir), rule, "Save it with PEFT again.") from error


def count_parameters(model: PeftModel) -> ParameterCount:
    """Trained parameters, and all parameters without the adapter's."""
    trained, total = model.get_nb_trainable_parameters()
    return ParameterCount(trained, total - trained)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
