"""What `--method` means: how the base is loaded, what is put on it, and what may come of it."""

from __future__ import annotations

import importlib.util
import math
import shlex
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from train.config import ALL_LINEAR, TrainConfig
from train.model import ParameterCount, cpu_computes_in_bf16, first_line, load_base, training_dtype
from train.principal import PRINCIPAL_INITS, begin_at_principal, held, lora_layers
from vllm_lora_ext.errors import BadSetting, MissingPackage
from vllm_lora_ext.peft_config import resolve_pattern

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    Trainable: TypeAlias = PreTrainedModel | PeftModel


def base_dtype(config: TrainConfig) -> torch.dtype:
    """What the base is held in while it is trained on.

    float32 for `full`, whose small steps would vanish in 16 bits; else what `--dtype` says, where `auto` is
    bfloat16 on a GPU or CPU that computes in it. An adapter's own weights are float32 whatever this is.
    """
    import torch

    if config.method == "full":
        return torch.float32
    if config.dtype == "auto" and not torch.cuda.is_available() and cpu_computes_in_bf16():
        return torch.bfloat16
    return training_dtype(config.dtype)


def prepare_model(config: TrainConfig) -> Trainable:
    """The base, loaded as the method wants it, with what is trained on it.

    For `full` it is the base itself, all of it trainable; else a `PeftModel` over a frozen base, whose
    trainable parameters are float32. They must be trained in place: restore weights with
    `load_state_dict`, never by new parameters.

    Raises:
        BadBaseModel: the weights cannot be loaded.
        BadSetting: targets or patterns name no module of this base.
        MissingPackage: `qlora`, and bitsandbytes is not installed.
    """
    base = prepare_base(config)
    if config.method == "full":
        base.requires_grad_(True)
        return base
    return add_adapter(base, config)


def prepare_base(config: TrainConfig) -> PreTrainedModel:
    """The base, loaded as the method wants it, with nothing on it.

    Raises:
        BadBaseModel, MissingPackage: as `prepare_model`.
    """
    base = _load(config)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return base


def _load(config: TrainConfig) -> PreTrainedModel:
    dtype = base_dtype(config)
    if config.method != "qlora":
        return load_base(config.base_path, dtype)
    if importlib.util.find_spec("bitsandbytes") is None:
        rule = "is not installed, and --method qlora needs it"
        raise MissingPackage("bitsandbytes", rule, "Run `pip install bitsandbytes`, or use --method lora.")
    import torch
    from transformers import BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    place: Any = {"": "cuda" if torch.cuda.is_available() else "cpu"}
    return load_base(config.base_path, dtype, quantization_config=nf4, device_map=place)


def add_adapter(base: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Freeze `base` and put a fresh LoRA or DoRA on the target modules.

    Raises:
        BadSetting: targets or patterns name no module of the base.
    """
    model = add_hollow_adapter(base, config)
    if config.init_lora_weights in PRINCIPAL_INITS:
        begin_at_principal(model, config.init_lora_weights)
    return model


def add_hollow_adapter(base: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """As `add_adapter`, right in shapes; the base's weights need not be there (torch's meta device).

    Raises:
        BadSetting: as `add_adapter`.
    """
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            # Such a name is an error here, below.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            model: PeftModel = get_peft_model(base, lora_config(config))
    except ValueError as error:
        raise BadSetting(
            f"--target-modules {' '.join(config.target_modules)}",
            f"do not fit this base ({first_line(error)})",
            f"Name linear modules of the base, for example q_proj v_proj, or {ALL_LINEAR}.",
        ) from error
    _require_that_names_meet(model, config)
    return model


def lora_config(config: TrainConfig) -> LoraConfig:
    """The settings in PEFT's terms; PiSSA and OLoRA have twice the rank at the same scaling."""
    from peft import LoraConfig

    is_principal = config.init_lora_weights in PRINCIPAL_INITS
    times = 2 if is_principal else 1
    alpha_times = math.sqrt(times) if config.use_rslora else times
    init = True if is_principal or config.init_lora_weights == "default" else config.init_lora_weights
    targets = config.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r * times,
        lora_alpha=_plain(config.lora_alpha * alpha_times),
        rank_pattern={name: rank * times for name, rank in config.ranks.items()},
        alpha_pattern={name: _plain(alpha * alpha_times) for name, alpha in config.alphas.items()},
        lora_dropout=config.lora_dropout,
        target_modules=ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets),
        use_rslora=config.use_rslora,
        use_dora=config.method == "dora",
        init_lora_weights=init,
    )


def _plain(number: float) -> float:
    """A whole number as one, which is how PEFT and everybody else writes alpha."""
    return int(number) if float(number).is_integer() else number


def _require_that_names_meet(model: PeftModel, config: TrainConfig) -> None:
    """PEFT passes over a name that no module has, as long as another one has a module."""
    modules = [name for name, _ in lora_layers(model)]
    known = sorted({name.rpartition(".")[2] for name in modules})
    stated: Mapping[str, tuple[str, ...]] = {
        "target-modules": () if config.target_modules == (ALL_LINEAR,) else config.target_modules,
        "rank-pattern": tuple(config.ranks),
        "alpha-pattern": tuple(config.alphas),
    }
    for flag, names in stated.items():
        missed = [name for name in names if not resolve_pattern({name: 1}, modules)]
        if missed:
            rule = "names no module of this base" if flag == "target-modules" else "names no target module"
            fix = f"Of those that you name it has {', '.join(known)}; {ALL_LINEAR} means all but the head."
            raise BadSetting(f"--{flag} {' '.join(missed)}", rule, fix)


def count_parameters(model: Trainable) -> ParameterCount:
    """Numbers that get a gradient, and numbers of the base; what 4 bits pack into one byte counts as two.

    The halves of PiSSA and OLoRA that stay as they are do not count as trained.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not hasattr(model, "get_nb_trainable_parameters"):
        return ParameterCount(trained, sum(parameter.numel() for parameter in model.parameters()))
    _, every = model.get_nb_trainable_parameters()
    return ParameterCount(trained - sum(map(held, model.parameters())), every - trained)


def serving_note(config: TrainConfig) -> str | None:
    """What has to be known before it is served, for stderr, model card and provenance; None if nothing."""
    if config.method == "dora":
        return (
            "vLLM cannot serve DoRA. `vllm-lora merge` makes a full model of it, which computes the same; "
            "`vllm-lora convert --max-rank N` makes the closest LoRA of it, and tells the error"
        )
    if config.method == "qlora":
        return (
            "Trained over the base in 4 bits (nf4). A server that holds the base in its own dtype computes "
            "with weights that differ from those by their rounding"
        )
    if config.method == "full":
        return f"A full model, no adapter: `{next_command(config)}` serves it as a base model"
    return None


def next_command(config: TrainConfig) -> str:
    """What to type once the run is finished."""
    if config.method == "dora":
        merged = f"{config.adapter_dir}-merged"
        return shlex.join(["vllm-lora", "merge", str(config.adapter_dir), "--output-dir", merged])
    if config.method == "full":
        return shlex.join(["vllm-lora", "serve", str(config.adapter_dir)])
    return shlex.join(["vllm-lora", "serve", "--adapters", config.output_dir])
