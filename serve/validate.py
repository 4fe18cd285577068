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
    inspections = inspect(sources, args.base_model, EngineLimits(args.max_lora_rank))
    if args.json:
        print(json.dumps([_as_data(item) for item in inspections], ensure_ascii=False, indent=2))
    else:
        screen(stderr=False).print(fleet_table(inspections))
    return 0 if all(item.admitted for item in inspections) else 2


def inspect(
    sources: Sequence[AdapterSource], base_model: str | None, limits: EngineLimits
) -> list[Inspection]:
    """Judge the adapters, each against the base that it names if none is stated and they differ."""
    if base_model:
        return inspect_fleet(sources, read_base_model(base_model), limits)
    return [
        inspection for source in sources for inspection in inspect_fleet([source], _base_of(source), limits)
    ]


def _base_of(source: AdapterSource) -> BaseModel | None:
    try:
        return read_base_model(agreed_base_model([source]))
    except (BadSetting, BadBaseModel):  # shapes stay unproven, and the table says so
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
