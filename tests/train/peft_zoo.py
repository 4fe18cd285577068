"""Adapters of every PEFT type, made by PEFT itself, with what is claimed of each conversion."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

QKV = ("q_proj", "k_proj", "v_proj")
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
}
RANK = 24  # what the conversions of the table may take at most; modules are 64 to 128 wide


@dataclass(frozen=True)
class Kind:
    """`claim` is what holds for modules of any size; `biased` is the claim where they have a bias."""

    title: str
    config: Callable[[], Any]
    claim: str  # exact, closest, refused
    rank: str = ""  # that exactness takes, in words
    biased: str = ""
    needs_base: bool = True
    before: Callable[[Any, Any], None] | None = None  # base and config, before PEFT wraps them


def make_bases(folder: Path) -> dict[str, str]:
    """A Qwen2 with tied embeddings and biases in attention, and a Llama with neither; random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).save_pretrained(folder / "qwen2")
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(folder / "llama")
    return {name: str(folder / name) for name in ("qwen2", "llama")}


def load(base: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def make_adapter(kind: Kind, base: str, folder: Path, initial: Path | None = None) -> Path:
    """Every trainable number moved at random, and saved as PEFT saves; `initial` gets it as it began."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, config = load(base), kind.config()
        if kind.before is not None:
            kind.before(model, config)
        tuned = peft.get_peft_model(model, config)
        if initial is not None:
            tuned.save_pretrained(str(initial))
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        if config.peft_type == peft.PeftType.ADALORA:
            _prune(tuned)
        tuned.save_pretrained(str(folder))
    return folder


def _prune(model: Any) -> None:
    """As AdaLoRA does at the end of its budget: the least important triplets go, ranks differ by module."""
    for name, tensor in model.named_parameters():
        if "lora_" in name:
            tensor.grad = torch.randn_like(tensor)
    for step in (1, model.peft_config["default"].total_step):
        model.base_model.update_and_allocate(step)


def _lora(**more: Any) -> Callable[[], Any]:
    return lambda: peft.LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": list(QKV), **more})


def _of(name: str, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(peft, name)(**{"target_modules": list(QKV), **more})


def _corda(base: Any, config: Any) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    def run() -> None:
        with torch.no_grad():
            for seed in range(4):
                base(torch.randint(0, 320, (1, 40), generator=torch.Generator().manual_seed(seed)))

    preprocess_corda(base, config, run_model=run)


def _corda_config() -> Any:
    from peft.tuners.lora.config import CordaConfig

    corda = CordaConfig(corda_method="kpm", use_float16_for_covariance=False)
    return _lora(init_lora_weights="corda", corda_config=corda)()


def _block_diagonal() -> Any:
    from peft.tuners.lora.config import BdLoraConfig

    both = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["k_proj", "v_proj"], nblocks=2)
    return _lora(use_bdlora=both)()


def _kasa() -> Any:
    from peft.tuners.lora.config import KasaConfig

    return _lora(kasa_config=KasaConfig())()


KINDS = (
    Kind("LoRA", _lora(), "exact", "r", needs_base=False),
    Kind(
        "LoRA, rank and alpha patterns, rsLoRA",
        _lora(use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 3}),
        "exact",
        "r",
        needs_base=False,
    ),
    Kind("LoRA, gaussian", _lora(init_lora_weights="gaussian"), "exact", "r", needs_base=False),
    Kind("LoRA, PiSSA", _lora(init_lora_weights="pissa"), "exact", "2r"),
    Kind("LoRA, PiSSA and rsLoRA", _lora(init_lora_weights="pissa", use_rslora=True), "exact", "2r"),
    Kind("LoRA, OLoRA", _lora(init_lora_weights="olora"), "exact", "2r"),
    Kind("LoRA, DoRA", _lora(use_dora=True), "closest"),
    Kind("LoRA, BD-LoRA", _block_diagonal, "exact", "r x blocks"),
    Kind("LoRA on the embedding", _lora(target_modules=[*QKV, "embed_tokens"]), "exact", "r"),
    Kind("LoRA on the head", _lora(target_modules=[*QKV, "lm_head"]), "exact", "r"),
    Kind("LoRA, head saved whole", _lora(modules_to_save=["lm_head"]), "closest"),
    Kind("LoRA, trained tokens", _lora(trainable_token_indices=[5, 6]), "exact", "r, tokens"),
    Kind("LoRA, trained biases", _lora(bias="lora_only"), "exact", "r", biased="refused"),
    Kind("LoRA, lora_bias", _lora(target_modules=["o_proj"], lora_bias=True), "refused"),
    Kind(
        "AdaLoRA",
        _of("AdaLoraConfig", init_r=12, target_r=4, total_step=10, lora_alpha=12),
        "exact",
        "what is left of init_r",
        needs_base=False,
    ),
    Kind("VeRA", _of("VeraConfig", r=16, target_modules=["q_proj", "o_proj"]), "exact", "r"),
    Kind("VeRA without its projections", _of("VeraConfig", r=16, save_projection=False), "exact", "r"),
    Kind("LoHa", _of("LoHaConfig", r=4, alpha=6), "exact", "r^2", needs_base=False),
    Kind(
        "LoKr",
        _of("LoKrConfig", r=2, alpha=6, decompose_both=True),
        "exact",
        "rank(w1) x rank(w2)",
        needs_base=False,
    ),
    Kind("LoKr, w1 whole", _of("LoKrConfig", r=4, alpha=6), "closest", needs_base=False),
    Kind("HRA", _of("HRAConfig", r=8), "exact", "r"),
    Kind("HRA, Gram-Schmidt", _of("HRAConfig", r=8, apply_GS=True), "exact", "r"),
    Kind("DeLoRA", _of("DeloraConfig", r=8), "exact", "r"),
    Kind("DEFT", _of("DeftConfig", r=8), "exact", "r"),
    Kind("TinyLoRA", _of("TinyLoraConfig"), "exact", "r"),
    Kind("Uni-LoRA", _of("UniLoraConfig"), "exact", "r"),
    Kind("VB-LoRA", _of("VBLoRAConfig", r=4, num_vectors=8, vector_length=16, topk=2), "exact", "r"),
    Kind("PSOFT", _of("PsoftConfig", r=8), "exact", "r"),
    Kind("PEANuT", _of("PeanutConfig", r=8), "exact", "r"),
    Kind(
        "Trainable tokens",
        _of("TrainableTokensConfig", token_indices=[3, 4], target_modules=["embed_tokens"]),
        "exact",
        "tokens",
    ),
    Kind("PVeRA", _of("PveraConfig", r=8), "exact", "r"),
    Kind("MiSS", _of("MissConfig", r=8), "exact", "r"),
    Kind("RandLoRA", _of("RandLoraConfig", r=8), "closest"),
    Kind("GraLoRA", _of("GraloraConfig", r=8, alpha=12, gralora_k=2), "exact", "r x blocks"),
    Kind("OFT", _of("OFTConfig", oft_block_size=16), "closest"),
    Kind("BOFT", _of("BOFTConfig", boft_block_size=4), "closest"),
    Kind("IA3", _of("IA3Config", feedforward_modules=[]), "closest"),
    Kind("HiRA", _of("HiraConfig", r=8), "closest"),
    Kind("FourierFT", _of("FourierFTConfig", n_frequency=50), "closest"),
    Kind("WaveFT", _of("WaveFTConfig", n_frequency=50), "closest"),
    Kind("C3A", _of("C3AConfig", block_size=16), "closest"),
    Kind("SHiRA", _of("ShiraConfig", r=4), "closest"),
    Kind("RoAd", _of("RoadConfig", group_size=16), "closest"),
    Kind("OSF", _of("OSFConfig"), "closest"),
    Kind("FRoD", _of("FrodConfig"), "closest"),
    Kind("GLoRA", _of("GloraConfig"), "closest", biased="refused"),
    Kind("SuperTuning", _of("SupertuningConfig"), "closest"),
    Kind("BEFT", _of("BeftConfig"), "refused"),
    Kind("LN tuning", _of("LNTuningConfig", target_modules=["norm"]), "refused"),
    Kind("Lily", _of("LilyConfig"), "refused"),
    Kind("Shadow", _of("ShadowConfig"), "refused"),
    Kind(
        "Prompt tuning",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "refused",
    ),
    Kind(
        "Prefix tuning",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
        "refused",
    ),
    Kind(
        "P-tuning", lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), "refused"
    ),
)
CORDA = Kind("LoRA, CorDA, with --initial-adapter", _corda_config, "exact", "2r", before=_corda)
KASA = Kind("LoRA, KaSA", _kasa, "closest")
