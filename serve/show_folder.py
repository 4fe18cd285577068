"""`vllm-lora show DIR`: an adapter's folder, as it would be judged, and what it is made of."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from serve.flags import read_rules
from serve.fleet import agreed_base_model, fleet_table, inspection_row
from serve.module_tables import DEFINITIONS, kinds_table, modules_table, other_lines
from serve.screen import screen
from serve.validate import inspection_data
from vllm_lora_ext.anatomy import Anatomy, dissect
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadSetting
from vllm_lora_ext.files import RegularFile
from vllm_lora_ext.inspection import Inspection, inspect_adapter, inspect_values
from vllm_lora_ext.peft_format import WEIGHTS_FILE, file_finding
from vllm_lora_ext.sources import AdapterSource
from vllm_lora_ext.tensor_file import read_header


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
    inspection, anatomy = _look_inside(inspection)
    if args.json:
        _print_json(inspection, anatomy)
    else:
        _print_tables(inspection, anatomy, one_row_each=args.modules)
    return 0 if inspection.admitted else 2


def _look_inside(inspection: Inspection) -> tuple[Inspection, Anatomy]:
    """What can be read of a folder, also of a refused one; with one more finding if it changes meanwhile."""
    try:
        with RegularFile(inspection.path / WEIGHTS_FILE) as file:
            places = inspection.places or read_header(file)
            return inspection, dissect(file, places, inspection.spec)
    except (OSError, ValueError) as error:
        if inspection.spec is not None:  # else the findings say already why it cannot be read
            inspection = inspection.with_findings([file_finding(error, WEIGHTS_FILE)])
        return inspection, Anatomy()


def _print_json(inspection: Inspection, anatomy: Anatomy) -> None:
    chat = {**dataclasses.asdict(inspection.chat), "state": inspection.chat.state}
    tensors = inspection.spec.tensors if inspection.spec else ()
    body = {
        **inspection_data(inspection),
        "chat": chat,
        "tensors": [dataclasses.asdict(tensor) for tensor in tensors],
        "modules": [dataclasses.asdict(module) for module in anatomy.modules],
        "other_tensors": [dataclasses.asdict(other) for other in anatomy.others],
    }
    print(json.dumps(body, ensure_ascii=False, indent=2))


def _print_tables(inspection: Inspection, anatomy: Anatomy, one_row_each: bool) -> None:
    out = screen(stderr=False)
    out.print(fleet_table([inspection_row(inspection)]))
    if anatomy.modules:
        out.print((modules_table if one_row_each else kinds_table)(anatomy))
        out.print(DEFINITIONS, soft_wrap=True)
    for line in other_lines(anatomy):
        out.print(line, soft_wrap=True)
    if inspection.chat.template is not None:
        out.print(inspection.chat.template, soft_wrap=True)
