"""The converted adapter's folder: a LoRA with its scaling in its factors, and the first one's chat files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from train.conversion.factors import Factors
from train.export import sha256_of
from vllm_lora_ext.contract import CHAT_FILES, IDENTITY_FILE, IDENTITY_FORMAT
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.files import read_whole
from vllm_lora_ext.peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE
from vllm_lora_ext.strict_json import parse_object

_MAX_IDENTITY_BYTES = 16 << 20


def write_lora(
    folder: Path,
    factors: Mapping[str, Factors],
    vocabulary: frozenset[str],
    base_model: str | None,
    task: str | None,
) -> None:
    """Config and weights in float32; modules in `vocabulary` are embeddings."""
    config = lora_config({name: one.rank for name, one in factors.items()}, base_model, task)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    tensors = {}
    for module, one in factors.items():
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if module in vocabulary
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{PREFIX}{module}.{a}"] = one.a.to(torch.float32).contiguous()
        tensors[f"{PREFIX}{module}.{b}"] = one.b.to(torch.float32).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def lora_config(ranks: Mapping[str, int], base_model: str | None, task: str | None) -> dict[str, Any]:
    """Every alpha is its rank; modules stand under their full names, so nothing else is meant."""
    largest = max(ranks.values())
    smaller = {f"^{module}": rank for module, rank in sorted(ranks.items()) if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_model,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": smaller,
        "alpha_pattern": dict(smaller),
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def carry_chat_files(source: Path, folder: Path, name: str, conversion: Mapping[str, Any]) -> None:
    """Template, sampling defaults and `identity.json`, which then also tells of the conversion.

    Raises:
        BadInput: a chat file cannot be read.
    """
    for file in CHAT_FILES:
        if file != IDENTITY_FILE and (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    path = source / IDENTITY_FILE
    try:
        body = parse_object(read_whole(path, _MAX_IDENTITY_BYTES)) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise BadInput(str(path), f"cannot be read ({error})", "Repair it, or remove it.") from error
    provenance = body.get("provenance")
    told = {**(provenance if isinstance(provenance, dict) else {}), "conversion": dict(conversion)}
    files = {file: sha256_of(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE)}
    body = {"format": IDENTITY_FORMAT, "name": name, **body, "files": files, "provenance": told}
    text = json.dumps(body, indent=2, ensure_ascii=False) + "\n"
    (folder / IDENTITY_FILE).write_text(text, encoding="utf-8")
