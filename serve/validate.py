"""`vllm-lora validate`: what a server would say of adapters, without starting one. No torch, no vllm."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from serve.flags import add_rules_flags, read_rules
from serve.fleet import agreed_base_model, fleet_table, inspection_row
from serve.screen import screen
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadSetting
from vllm_lora_ext.inspection import Inspection, inspect_adapter, inspect_values
from vllm_lora_ext.names import name_key, taken
from vllm_lora_ext.sources import AdapterSource, find_sources
from vllm_lora_ext.spec import EngineLimits, printable


def main(argv: Sequence[str]) -> int:
    """0 when every adapter is admitted, 2 when any is refused; `--json` prints the findings as data."""
    parser = argparse.ArgumentParser(
        prog="vllm-lora validate",
        description="Check adapters against their base model: config, tensors, values, chat template.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="an adapter, or a folder of them")
    add_rules_flags(parser)
    parser.add_argument("--max-lora-rank", type=int, default=EngineLimits().max_lora_rank)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    sources = find_sources(args.folders)
    if not sources:
        raise BadSetting(", ".join(args.folders), "holds no adapter", "Give an adapter's folder.")
    stated = read_base_model(args.base_model) if args.base_model else None
    inspections = _inspect_all(sources, stated, args)
    if args.json:
        print(json.dumps([inspection_data(item) for item in inspections], ensure_ascii=False, indent=2))
    else:
        screen(stderr=False).print(fleet_table([inspection_row(item) for item in inspections]))
    return 0 if all(item.admitted for item in inspections) else 2


def _inspect_all(
    sources: Sequence[AdapterSource], stated: BaseModel | None, args: argparse.Namespace
) -> list[Inspection]:
    inspections, names = [], set[str]()
    for source in sources:
        if source.folder is None:
            raise BadSetting(source.path, "is no folder here", "Fetch it first, or `vllm-lora publish` it.")
        rules = read_rules(args, stated or _named_base(source), EngineLimits(args.max_lora_rank))
        inspection = inspect_adapter(source.folder, rules, source.name)
        if inspection.admitted:
            inspection = inspect_values(inspection, rules)
        if name_key(source.name) in names:
            inspection = inspection.with_findings([taken(source.name)])
        names.add(name_key(source.name))
        inspections.append(inspection)
    return inspections


def _named_base(source: AdapterSource) -> BaseModel | None:
    """The base that an adapter names itself; None if it cannot be had, which leaves shapes unproven."""
    try:
        return read_base_model(agreed_base_model([source]), offline=True)
    except (BadBaseModel, BadSetting):
        return None


def inspection_data(item: Inspection) -> dict[str, object]:
    """An inspection for machines."""
    return {
        "adapter": printable(item.name),
        "state": item.state,
        "rank": item.spec.max_rank if item.spec else None,
        "size_bytes": item.spec.size_bytes if item.spec else None,
        "template": item.chat.state,
        "findings": [dataclasses.asdict(finding) for finding in item.findings],
    }
