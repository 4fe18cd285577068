"""What stands beside the weights of a merged model: the base's files, and how it wants to be asked."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.export import whole_template
from train.merge_adapter import MergeAdapter
from train.merge_base import INDEX_FILE, MergeBase
from train.merge_combine import Recipe
from vllm_lora_ext.contract import (
    GENERATION_FILE,
    IDENTITY_FILE,
    TOKENIZER_FILE,
    ChatSettings,
    Identity,
    read_chat_settings,
    write_contract,
)
from vllm_lora_ext.errors import BadInput
from vllm_lora_ext.peft_format import public_name

CONFIG = "config.json"
# Weights in any form, and what tells of the base only.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt", ".tflite")
_LEFT_OUT = (INDEX_FILE, IDENTITY_FILE, "README.md")
_END_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_files(base: MergeBase, folder: Path, is_untied: bool) -> None:
    """The base's tokenizer, config and what else is no weight; an untied head is noted in the config."""
    for path in sorted(base.folder.iterdir()):
        is_weight = path.name.endswith((*_WEIGHTS, ".index.json"))
        if path.is_file() and not path.name.startswith(".") and not is_weight and path.name not in _LEFT_OUT:
            shutil.copyfile(path, folder / path.name)
    if is_untied:
        config = {**base.config, "tie_word_embeddings": False}
        inner = config.get("text_config")
        if isinstance(inner, Mapping) and "tie_word_embeddings" in inner:
            config["text_config"] = {**inner, "tie_word_embeddings": False}
        _write_json(folder / CONFIG, config)


def write_chat(
    base: MergeBase,
    adapters: Sequence[MergeAdapter],
    recipe: Recipe,
    folder: Path,
    name: str,
    digests: Mapping[str, str],
) -> list[str]:
    """The first adapter's chat settings become the model's own; gives back what a person has to know.

    A server takes of a base model its template and `generation_config.json`, so a system prompt is put into
    the template, as when a whole model is trained. Stop strings have no such place: vLLM reads none of a base
    model, and with `stop_strings` in that file transformers' `generate` fails where it is given no tokenizer.
    They are kept in `identity.json`, from where `vllm-lora serve` takes them.
    """
    chat = adapters[0].inspection.chat
    notices = _differences(adapters)
    _write_generation(base, chat, folder / GENERATION_FILE)
    if chat.stop:
        stops = json.dumps(list(chat.stop), ensure_ascii=False)
        notices.append(
            "`vllm-lora serve` applies the stop strings, which are in identity.json; "
            f"with any other server send stop={stops}"
        )
    template = chat.template or _base_template(base.folder)
    if template is None:
        if chat.system_prompt:
            notices.append("neither adapter nor base has a chat template, so the system prompt is left out")
        return notices
    about = _provenance(base, adapters, recipe)
    identity = Identity(name, template, about, digests, chat.system_prompt, chat.stop)
    identity = dataclasses.replace(identity, template=whole_template(identity))
    write_contract(folder, identity)
    _forget_template(folder / TOKENIZER_FILE)
    if not chat.trained:  # nobody vouches for it, merged or not
        body = json.loads(identity.to_json())
        body["chat_template"]["trained"] = False
        _write_json(folder / IDENTITY_FILE, body)
    return notices


def _differences(adapters: Sequence[MergeAdapter]) -> list[str]:
    first, *others = adapters
    differing = [
        public_name(other.path)
        for other in others
        if other.inspection.chat.canonical() != first.inspection.chat.canonical()
    ]
    if not differing:
        return []
    return [
        f"chat template, system prompt, stops and sampling are those of {public_name(first.path)}; "
        f"{', '.join(differing)} has others"
    ]


def _base_template(folder: Path) -> str | None:
    try:
        return read_chat_settings(folder).template
    except BadInput:  # a base may hold what an adapter must not
        return None


def _write_generation(base: MergeBase, chat: ChatSettings, path: Path) -> None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        text = base.config.get("text_config")
        parts = {**(text if isinstance(text, Mapping) else {}), **base.config}
        known = {key: parts[key] for key in _END_TOKENS if parts.get(key) is not None}
    known.pop("_from_model_config", None)  # with this mark transformers would make the file anew
    if chat.sampling:
        # As vLLM reads a temperature of 0.
        known |= {"do_sample": chat.sampling.get("temperature", 1) > 0, **chat.sampling}
    _write_json(path, known)


def _provenance(base: MergeBase, adapters: Sequence[MergeAdapter], recipe: Recipe) -> dict[str, Any]:
    parts = [{"name": public_name(adapter.path), "sha256": adapter.digest} for adapter in adapters]
    return {"merged": {"base_model": public_name(Path(base.name)), "adapters": parts, **recipe.as_json()}}


def _forget_template(path: Path) -> None:
    """Older files have the template inside; the one in a file of its own is the only one from now on."""
    if not path.exists():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict) and config.pop("chat_template", None) is not None:
        _write_json(path, config)


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
