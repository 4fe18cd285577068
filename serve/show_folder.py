"""`vllm-lora show DIR`: an adapter's folder, as it would be judged."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from serve.flags import read_rules
from serve.fleet import agreed_base_model, fleet_table, inspection_row
from serve.screen import screen
from serve.validate import inspection_data
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadSetting
from vllm_lora_ext.inspection import inspect_adapter, inspect_values
from vllm_lora_ext.sources import AdapterSource


def show_folder(args: argparse.Namespace) -> int:
    """Print what a folder is and what speaks against it; 2 if it would be refused."""
    folder = Path(args.adapter)
    if not folder.is_dir():
        raise BadSetting(args.adapter, "no such folder", "Give an adapter's folder, or a published name.")
    source = AdapterSource(folder.name, args.adapter)
    try:
        base = read_base_model(args.base_model or agreed_base_model([source]), offline=not args.base_model)
    except (BadBaseModel, BadSetting):
        if args.base_model:
            raise
        base = None
    rules = read_rules(args, base)
    inspection = inspect_values(inspect_adapter(folder, rules), rules)
    if args.json:
        chat = {**dataclasses.asdict(inspection.chat), "state": inspection.chat.state}
        tensors = (
            [dataclasses.asdict(tensor) for tensor in inspection.spec.tensors] if inspection.spec else []
        )
        body = {**inspection_data(inspection), "chat": chat, "tensors": tensors}
        print(json.dumps(body, ensure_ascii=False, indent=2))
    else:
        screen(stderr=False).print(fleet_table([inspection_row(inspection)]))
        if inspection.chat.template is not None:
            screen(stderr=False).print(inspection.chat.template, soft_wrap=True)
    return 0 if inspection.admitted else 2
