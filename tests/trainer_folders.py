"""Adapter folders as the well-known trainers leave them: their files, their names for the base, their litter.

Every builder takes the folder to write and the folder of the base, and gives back the adapter's folder.
The files are those of public sources and listings, and of transformers' Trainer as it ran here; the set of
fields in `adapter_config.json` is that of the PEFT version beside the trainer.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.conftest import BASE_CONFIG, PROJECTIONS, lora_tensors

Builder = Callable[[Path, Path], Path]

TEMPLATE = (  # for a base that has none of its own
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Seven projections as Unsloth writes them when it chooses the modules itself.
UNSLOTH_TARGETS = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    rf"(?:{'|'.join(PROJECTIONS)}).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    rf"(?:(?:{'|'.join(PROJECTIONS)})))"
)
# What PEFT 0.10 (spring of 2024) writes, and what came with later versions.
_PEFT_0_10: dict[str, Any] = {
    "target_modules": None,
    **dict.fromkeys(("auto_mapping", "base_model_name_or_path", "layer_replication", "layers_pattern")),
    **dict.fromkeys(("layers_to_transform", "megatron_config", "modules_to_save", "revision")),
    **{"alpha_pattern": {}, "loftq_config": {}, "rank_pattern": {}},
    **dict.fromkeys(("fan_in_fan_out", "use_dora", "use_rslora"), False),
    **{"inference_mode": True, "init_lora_weights": True, "megatron_core": "megatron.core"},
    **{"bias": "none", "lora_alpha": 16, "lora_dropout": 0.0, "r": 8},
    **{"peft_type": "LORA", "task_type": "CAUSAL_LM"},
}
_PEFT_0_15 = {
    **_PEFT_0_10,
    **dict.fromkeys(("corda_config", "eva_config", "exclude_modules", "trainable_token_indices")),
    "lora_bias": False,
}
_PEFT_0_19 = {
    **_PEFT_0_15,
    **dict.fromkeys(("alora_invocation_tokens", "arrow_config", "lora_ga_config", "target_parameters")),
    **{"ensure_weight_tying": False, "peft_version": "0.19.1", "qalora_group_size": 16},
    **{"use_bdlora": None, "use_qalora": False},
}
PEFT_0_21 = {
    **_PEFT_0_19,
    **dict.fromkeys(("kasa_config", "monteclora_config", "velora_config")),
    "peft_version": "0.21.2",
}


def hf_trainer(folder: Path, base: Path) -> Path:
    """`checkpoint-500` of a script around transformers' Trainer, on a machine that is rented by the hour."""
    checkpoint = folder / "checkpoint-500"
    source = "/data/autodl-tmp/Qwen/Qwen2-0___5B-Instruct"  # ModelScope writes a dot as ___
    config = {**_PEFT_0_10, "base_model_name_or_path": source, "lora_alpha": 32, "lora_dropout": 0.1}
    _adapter(checkpoint, config)
    _state(checkpoint, 500)
    _tokenizer(checkpoint, base, inside_config=True)
    _readme(checkpoint, source)
    return checkpoint


def llama_factory(folder: Path, base: Path) -> Path:
    """The output folder of LLaMA-Factory: the final adapter, its checkpoints and its reports in one."""
    source = "/mnt/workspace/.cache/modelscope/models/Qwen/Qwen2-0___5B-Instruct"
    config = {**_PEFT_0_15, "base_model_name_or_path": source, "target_modules": list(PROJECTIONS[::-1])}
    places = [folder, folder / "checkpoint-100", folder / "checkpoint-150"]
    for place in places:
        _adapter(place, config)
        _tokenizer(place, base)
        _readme(place, source, "base_model_relation: adapter", "- llama-factory", "- lora")
    for place, step in zip(places[1:], (100, 150), strict=True):
        _state(place, step)
    (folder / "training_args.bin").write_bytes(_torch_file({"output_dir": "saves/sft"}))
    results = {"epoch": 3.0, "total_flos": 1.0e12, "train_loss": 0.93, "train_runtime": 61.2}
    for name in ("all_results.json", "train_results.json"):
        _json(folder / name, results)
    _json(folder / "trainer_state.json", _trainer_state(150))
    lines = [{"current_steps": step, "total_steps": 150, "loss": 2.5 - step / 100} for step in (10, 20, 150)]
    (folder / "trainer_log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "training_loss.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    return folder


def trl(folder: Path, base: Path) -> Path:
    """The output folder of TRL's SFTTrainer: the base by its hub id, the template in a file of its own."""
    source = "Qwen/Qwen2-0.5B-Instruct"
    _adapter(folder, {**_PEFT_0_19, "base_model_name_or_path": source, "lora_dropout": 0.05})
    _tokenizer(folder, base)
    (folder / "training_args.bin").write_bytes(_torch_file({"max_length": 1024}))
    _readme(folder, source, "library_name: peft", "- sft", "- trl")
    return folder


def axolotl(folder: Path, base: Path) -> Path:
    """The output folder of Axolotl with `lora_target_linear`: it holds the base's config.json as well."""
    source = "Qwen/Qwen2-0.5B-Instruct"
    targets = ["up_proj", "o_proj", "k_proj", "gate_proj", "down_proj", "v_proj", "q_proj"]
    config = {
        **_PEFT_0_19,
        "base_model_name_or_path": source,
        "lora_dropout": 0.05,
        "target_modules": targets,
    }
    for place in (folder, folder / "checkpoint-64"):
        _adapter(place, config)
        _readme(place, source, "- axolotl", "- generated_from_trainer")
        _tokenizer(place, base)
    _state(folder / "checkpoint-64", 64)
    (folder / "training_args.bin").write_bytes(_torch_file({"output_dir": "./outputs/lora-out"}))
    of_base = json.loads((base / "config.json").read_text())
    _json(folder / "config.json", {**of_base, "dtype": "bfloat16", "use_cache": False})
    (folder / "debug.log").write_text(
        "[INFO] Training completed! Saving trained model to ./outputs/lora-out\n"
    )
    return folder


def unsloth(folder: Path, base: Path) -> Path:
    """What Unsloth saves: a 4-bit copy as its base, and an expression for the modules."""
    source = "unsloth/qwen2-0.5b-instruct-bnb-4bit"
    mapping = {
        "base_model_class": "Qwen2ForCausalLM",
        "parent_library": "transformers.models.qwen2.modeling_qwen2",
        "unsloth_fixed": True,
    }
    config = {**PEFT_0_21, "base_model_name_or_path": source, "auto_mapping": mapping}
    _adapter(folder, {**config, "target_modules": UNSLOTH_TARGETS})
    _tokenizer(folder, base)
    _readme(folder, source, "library_name: peft", "- unsloth", "- lora")
    return folder


QWEN3_MOE_CONFIG: dict[str, Any] = {
    **BASE_CONFIG,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "head_dim": 32,
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    **{"decoder_sparse_step": 1, "mlp_only_layers": []},
}
QWEN2_5_VL_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "text_config": {**BASE_CONFIG, "model_type": "qwen2_5_vl_text"},
    "vision_config": {"model_type": "qwen2_5_vl", "depth": 1, "hidden_size": 32, "out_hidden_size": 64},
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}


def qwen3_moe_adapter(folder: Path, base: Path, experts: bool = False) -> Path:
    """An adapter of a mixture of experts, and its base's config; `experts` trains these too, one by one."""
    source = _base(base, QWEN3_MOE_CONFIG)
    hidden, width = QWEN3_MOE_CONFIG["hidden_size"], QWEN3_MOE_CONFIG["moe_intermediate_size"]
    modules = {"self_attn.q_proj": (128, hidden), "self_attn.o_proj": (hidden, 128)}
    modules |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (64, hidden))
    if experts:  # the names of transformers 4, where each expert had modules of its own
        for expert in range(QWEN3_MOE_CONFIG["num_experts"]):
            modules[f"mlp.experts.{expert}.gate_proj"] = (width, hidden)
            modules[f"mlp.experts.{expert}.up_proj"] = (width, hidden)
            modules[f"mlp.experts.{expert}.down_proj"] = (hidden, width)
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {**PEFT_0_21, "base_model_name_or_path": source, "target_modules": targets}
    return _adapter(folder, config, _tensors(modules))


def vlm_language_adapter(folder: Path, base: Path, stem: str = "model.language_model") -> Path:
    """An adapter of the language model inside a Qwen2.5-VL, and its base's config.

    `stem` is `model` for adapters from transformers before 4.52.
    """
    source = _base(base, QWEN2_5_VL_CONFIG)
    ours, theirs = "base_model.model.model.", f"base_model.model.{stem}."
    tensors = {theirs + name.removeprefix(ours): tensor for name, tensor in lora_tensors().items()}
    return _adapter(folder, {**PEFT_0_21, "base_model_name_or_path": source}, tensors)


def gptq_base(base: Path) -> Path:
    """A base whose weights are in 4 bits, seen by admission: its config and nothing else."""
    _base(base, {**BASE_CONFIG, "quantization_config": GPTQ})
    return base


def gptq_adapter(folder: Path, base: Path) -> Path:
    """An adapter that was trained on `gptq_base`, which it writes."""
    return _adapter(folder, {**PEFT_0_21, "base_model_name_or_path": str(gptq_base(base))})


def _base(base: Path, config: dict[str, Any]) -> str:
    base.mkdir(parents=True, exist_ok=True)
    _json(base / "config.json", config)
    return str(base)


def _adapter(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    """Config and weights as PEFT saves them; without targets in `config`, those of a Qwen2."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {**config, "target_modules": config["target_modules"] or list(PROJECTIONS)}
    _json(folder / "adapter_config.json", dict(sorted(body.items())))
    weights = folder / "adapter_model.safetensors"
    save_file(lora_tensors(body["r"]) if tensors is None else tensors, weights, metadata={"format": "pt"})
    return folder


def _tensors(modules: dict[str, tuple[int, int]], rank: int = 8) -> dict[str, np.ndarray]:
    chance, tensors = np.random.default_rng(0), {}
    for layer, (module, (out_features, in_features)) in itertools.product((0, 1), modules.items()):
        stem = f"base_model.model.model.layers.{layer}.{module}"
        tensors[f"{stem}.lora_A.weight"] = chance.normal(size=(rank, in_features)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = chance.normal(size=(out_features, rank)).astype(np.float32)
    return tensors


def template_of(base: Path) -> str:
    """The chat template of a base, wherever it stands; `TEMPLATE` if it has none."""
    if (base / "chat_template.jinja").is_file():
        return (base / "chat_template.jinja").read_text(encoding="utf-8")
    config = base / "tokenizer_config.json"
    stated = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    return stated if isinstance(stated, str) else TEMPLATE


def _tokenizer(folder: Path, base: Path, inside_config: bool = False) -> None:
    """The base's tokenizer; older versions of transformers put the template `inside_config`."""
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config: dict[str, Any] = {**tokens, "model_max_length": 1024, "tokenizer_class": "Qwen2Tokenizer"}
    if inside_config:
        config["chat_template"] = template_of(base)
        _json(folder / "added_tokens.json", {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2})
        _json(folder / "special_tokens_map.json", tokens)
        _json(folder / "vocab.json", {"a": 3})
        (folder / "merges.txt").write_text("#version: 0.2\n")
    else:
        (folder / "chat_template.jinja").write_text(template_of(base), encoding="utf-8")
    _json(folder / "tokenizer_config.json", config)
    model = {"type": "BPE", "vocab": {"a": 3}, "merges": []}
    _json(folder / "tokenizer.json", {"version": "1.0", "model": model})


def _state(folder: Path, step: int) -> None:
    """What it takes to go on training: pickles, every one of them."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(_torch_file({"name": name, "step": step}))
    _json(folder / "trainer_state.json", _trainer_state(step))


def _trainer_state(step: int) -> dict[str, Any]:
    history = [{"epoch": 1.0, "grad_norm": 0.8, "learning_rate": 1e-4, "loss": 1.2, "step": step}]
    return {"best_metric": None, "epoch": 1.0, "global_step": step, "log_history": history, "max_steps": step}


def _torch_file(body: dict[str, Any]) -> bytes:
    """A file as `torch.save` makes it: a pickle in a zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(body, protocol=2))
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _readme(folder: Path, source: str, *lines: str) -> None:
    fields = [line for line in lines if not line.startswith("-")]
    tags = [line for line in lines if line.startswith("-")]
    head = ["---", f"base_model: {source}", *fields, *(["tags:", *tags] if tags else []), "---"]
    (folder / "README.md").write_text("\n".join([*head, "", "# Model Card for Model ID", ""]))


def _json(path: Path, body: Any) -> None:
    path.write_text(json.dumps(body, indent=2), encoding="utf-8")


WITH_OWN_BASE: dict[str, Builder] = {  # these write the base's config.json into the base's folder
    "qwen3_moe": qwen3_moe_adapter,
    "qwen2_5_vl": vlm_language_adapter,
    "gptq": gptq_adapter,
}
TRAINERS: dict[str, Builder] = {
    "hf_trainer": hf_trainer,
    "llama_factory": llama_factory,
    "trl": trl,
    "axolotl": axolotl,
    "unsloth": unsloth,
}
