"""`vllm-lora validate`: what a server would say of adapters, without starting one. No torch, no vllm."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence

from serve.fleet import (
    AdapterSource,
    agreed_base_model,
    find_sources,
    fleet_table,
    inspect_fleet,
)
from serve.screen import screen
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.errors import BadBaseModel, BadSetting
from vllm_lora_ext.inspection import Inspection
from vllm_lora_ext.spec import EngineLimits


def main(argv: Sequence[str]) -> int:
    """0 when every adapter is admitted, 2 when any is refused; `--json` prints the findings as data."""
    parser = argparse.ArgumentParser(
        prog="vllm-lora validate",
        description="Check adapters against their base model: all findings at once.",
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="an adapter, or a folder of them")
    parser.add_argument("--base-model", help="default: the one that the adapters name")
    parser.add_argument("--max-lora-rank", type=int, default=EngineLimits().max_lora_rank)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    sources = find_sources(args.folders)
    if not sources:
        raise BadSetting(", ".join(args.folders), "holds no adapter", "Give an adapter's folder.")
    stated = read_base_model(args.base_model) if args.base_model else None
    limits = EngineLimits(args.max_lora_rank)
    inspections = inspect_fleet(sources, lambda source: stated or _named_base(source), limits)
    if args.json:
        print(json.dumps([_as_data(item) for item in inspections], ensure_ascii=False, indent=2))
    else:
        screen(stderr=False).print(fleet_table(inspections))
    return 0 if all(item.admitted for item in inspections) else 2


def _named_base(source: AdapterSource) -> BaseModel | None:
    """The base that an adapter names itself; None if it cannot be had, which leaves shapes unproven."""
    try:
        return read_base_model(agreed_base_model([source]))
    except (BadBaseModel, BadSetting):
        return None


def _as_data(item: Inspection) -> dict[str, object]:
    return {
        "adapter": item.name,
        "state": item.state,
        "rank": item.spec.max_rank if item.spec else None,
        "size_bytes": item.spec.size_bytes if item.spec else None,
        "template": item.chat.state,
        "findings": [dataclasses.asdict(finding) for finding in item.findings],
    }
