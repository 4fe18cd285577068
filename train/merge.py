"""`vllm-lora merge`: an adapter and its base become one full model that any server can load."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from train.answers import base_model_of
from train.export import check_output, finished_folder
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadInput, OutputExists
from vllm_lora_ext.inspection import Rules, inspect_adapter, require_admitted
from vllm_lora_ext.peft_format import CONFIG_FILE


def merge(adapter_dir: Path, base_model: str | None, output_dir: Path) -> None:
    """Write base + adapter to `output_dir`, with the adapter's chat template, in the base's dtype.

    The update is computed and added in float32 and rounded once.

    Raises:
        OutputExists: there is something at `output_dir`.
        AdapterRefused: the adapter does not fit the base.
        BadBaseModel, BadSetting: the base cannot be read, or is not named anywhere.
    """
    if output_dir.exists():  # also one of ours: a merged model is never replaced
        raise OutputExists(str(output_dir), "is there already", "Choose another --output-dir.")
    check_output(output_dir, overwrite=False)
    base_name = base_model_of(adapter_dir, base_model)
    # What a server cannot serve as an adapter, PEFT may well merge: DoRA's magnitudes.
    allow = frozenset({"feature_unsupported", "module_unknown"} if _is_dora(adapter_dir) else ())
    inspection = inspect_adapter(adapter_dir, Rules(read_base_model(base_name), allow=allow))
    require_admitted(inspection)

    import torch
    from transformers import AutoConfig

    from train.model import attach_adapter, load_base, load_tokenizer

    tokenizer = load_tokenizer(base_name)
    model = attach_adapter(load_base(base_name, torch.float32), adapter_dir)
    stored_dtype = AutoConfig.from_pretrained(base_name).dtype or torch.float32
    try:
        merged = model.merge_and_unload(safe_merge=True).to(dtype=stored_dtype)
    except ValueError as error:  # PEFT's check for NaN
        raise BadInput(str(adapter_dir), str(error).rstrip("."), "Train it again.") from error
    if inspection.chat.template is not None:
        tokenizer.chat_template = inspection.chat.template
    with finished_folder(output_dir) as staging:
        merged.save_pretrained(str(staging))
        tokenizer.save_pretrained(str(staging))


def _is_dora(adapter_dir: Path) -> bool:
    try:
        config = json.loads((adapter_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the inspection says what is wrong with it
        return False
    return isinstance(config, dict) and config.get("use_dora") is True


def main(argv: Sequence[str]) -> int:
    """Merge from command-line arguments; prints the folder of the merged model on stdout."""
    parser = argparse.ArgumentParser(
        prog="vllm-lora merge",
        description="Merge an adapter into its base model: one full model, no LoRA at run time.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", type=Path, metavar="DIR", help="the adapter's folder")
    parser.add_argument("--base-model", help="its base (default: the one its config names)")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to make")
    args = parser.parse_args(argv)
    merge(args.adapter, args.base_model, args.output_dir)
    print(args.output_dir)
    print("Serve it with: vllm-lora serve", args.output_dir, file=sys.stderr)
    return 0
