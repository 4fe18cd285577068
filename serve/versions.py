"""`vllm-lora ls`, `show`, `publish`, `rollback`, `rm`: names and versions of a state folder, no server."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from serve.flags import add_rules_flags, at_least, read_rules
from serve.fleet import agreed_base_model, entry_row, fleet_table, inspection_row
from serve.screen import screen
from serve.validate import inspection_data
from vllm_lora_ext.base_model import BaseModel, read_base_model
from vllm_lora_ext.catalog import KEEP_VERSIONS, Catalog
from vllm_lora_ext.errors import BadBaseModel, BadSetting
from vllm_lora_ext.inspection import Rules, inspect_adapter, inspect_values
from vllm_lora_ext.peft_format import is_adapter_folder
from vllm_lora_ext.publishing import judge_published, publish
from vllm_lora_ext.records import Entry
from vllm_lora_ext.sources import AdapterSource, find_sources


def _parser(verb: str, description: str, state_dir_required: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vllm-lora {verb}", description=description, allow_abbrev=False)
    parser.add_argument(
        "--state-dir",
        type=Path,
        required=state_dir_required,
        metavar="DIR",
        help="the server's state folder; it prints which when it starts",
    )
    parser.add_argument("--json", action="store_true", help="print data")
    return parser


def list_names(argv: Sequence[str]) -> int:
    """`vllm-lora ls`: every name with its live version."""
    args = _parser("ls", "Names and live versions.").parse_args(argv)
    with _reading(args.state_dir) as catalog:
        entries = catalog.entries()
        findings = [judge_published(entry.name, entry.live_version, catalog, Rules()) for entry in entries]
        if args.json:
            _print_json([_entry_data(entry, catalog) for entry in entries])
        else:
            rows = [entry_row(entry, found) for entry, found in zip(entries, findings, strict=True)]
            screen(stderr=False).print(fleet_table(rows))
    return 0


def show(argv: Sequence[str]) -> int:
    """`vllm-lora show DIR|NAME`: an adapter folder, or a name with its versions and what happened to it."""
    parser = _parser("show", "One adapter: a folder, or a published name.", state_dir_required=False)
    parser.add_argument("adapter", metavar="DIR|NAME")
    parser.add_argument("--verify", action="store_true", help="compare every byte of the live version")
    add_rules_flags(parser)
    args = parser.parse_args(argv)
    if args.state_dir is None:
        return _show_folder(args)
    with _reading(args.state_dir) as catalog:
        entry = catalog.entry(args.adapter)
        if args.verify:
            catalog.store.verify(entry.live)
        if args.json:
            _print_json(_entry_data(entry, catalog))
        else:
            _print_entry(entry, catalog)
    return 0


def publish_folder(argv: Sequence[str]) -> int:
    """`vllm-lora publish DIR`: judge an adapter and make it the live version of its name."""
    parser = _parser("publish", "Judge an adapter, store it, and make it the live version of its name.")
    parser.add_argument(
        "adapter", metavar="DIR|URL", help="a folder, hf://org/repo[@rev], s3://..., gs://..."
    )
    parser.add_argument("--name", help="default: the folder's")
    parser.add_argument("--replace", action="store_true", help="replace what the name stands for now")
    parser.add_argument("--keep-versions", type=at_least(1), default=KEEP_VERSIONS, metavar="N")
    add_rules_flags(parser)
    args = parser.parse_args(argv)
    source = _one_source(args.adapter, args.name)
    with Catalog(args.state_dir, keep_versions=args.keep_versions) as catalog:
        base = _base_of(source, args.base_model, catalog)
        entry, inspection = publish(source, catalog, read_rules(args, base), args.replace)
        if base is not None and not catalog.base():
            catalog.note_base(base.name, base.fingerprint)
        for finding in inspection.findings:
            screen().print(str(finding))
        if args.json:
            _print_json(_entry_data(entry, catalog))
        else:
            print(f"{entry.name}@{entry.live_version.short}")
    return 0


def rollback(argv: Sequence[str]) -> int:
    """`vllm-lora rollback NAME`: make an earlier version live again."""
    parser = _parser("rollback", "Make an earlier version live again.")
    parser.add_argument("name")
    parser.add_argument("--to", metavar="DIGEST", help="the beginning of its digest; default: the one before")
    args = parser.parse_args(argv)
    with Catalog(args.state_dir) as catalog:
        version = catalog.rollback(args.name, args.to)
        if args.json:
            _print_json(_entry_data(catalog.entry(args.name), catalog))
        else:
            print(f"{args.name}@{version.short}")
    return 0


def remove(argv: Sequence[str]) -> int:
    """`vllm-lora rm NAME...`: take names out of service, with their versions."""
    parser = _parser("rm", "Take names out of service, and remove their versions from the store.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    args = parser.parse_args(argv)
    with Catalog(args.state_dir) as catalog:
        catalog.remove(args.names)
        collected = catalog.collect()
    if args.json:
        _print_json({"removed": args.names, "collected": collected})
    else:
        print("\n".join(args.names))
    return 0


def _reading(state_dir: Path) -> Catalog:
    if not state_dir.is_dir():
        raise BadSetting(str(state_dir), "no such state folder", "The server prints which when it starts.")
    return Catalog(state_dir, readonly=True)


def _one_source(adapter: str, name: str | None) -> AdapterSource:
    if "://" not in adapter and Path(adapter).is_dir() and not is_adapter_folder(Path(adapter)):
        raise BadSetting(adapter, "is a folder of adapters, or none at all", "Publish one adapter at a time.")
    (source,) = find_sources([adapter])
    return source if name is None else dataclasses.replace(source, name=name)


def _base_of(source: AdapterSource, stated: str | None, catalog: Catalog) -> BaseModel | None:
    """The base to judge by: the stated one, the one that the state folder is for, the adapter's own."""
    known = catalog.base()
    if stated or known:
        base = read_base_model(stated or known["name"])
        if known and base.fingerprint != known["fingerprint"]:
            fix = "Choose another --state-dir: one is for one base model."
            raise BadSetting(base.public_name, f"is not the base of this state folder, {known['name']}", fix)
        return base
    try:
        return read_base_model(agreed_base_model([source]))
    except (BadBaseModel, BadSetting):
        return None


def _show_folder(args: argparse.Namespace) -> int:
    folder = Path(args.adapter)
    if not folder.is_dir():
        fix = "Give an adapter's folder, or --state-dir for a published name."
        raise BadSetting(args.adapter, "no such folder", fix)
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
        _print_json({**inspection_data(inspection), "chat": chat, "tensors": tensors})
    else:
        screen(stderr=False).print(fleet_table([inspection_row(inspection)]))
        if inspection.chat.template is not None:
            screen(stderr=False).print(inspection.chat.template)
    return 0 if inspection.admitted else 2


def _entry_data(entry: Entry, catalog: Catalog) -> dict[str, Any]:
    """An entry for machines, with where its live version lies and where it came from."""
    findings = judge_published(entry.name, entry.live_version, catalog, Rules())
    return {
        **dataclasses.asdict(entry),
        "version": entry.live_version.short,
        "state": entry_row(entry, findings).state,
        "provenance": catalog.store.provenance(entry.live),
        "proofs": catalog.proofs(entry.live),
    }


def _print_entry(entry: Entry, catalog: Catalog) -> None:
    out = screen(stderr=False)
    table = Table("version", "live", "rank", "size", "template", "state", "published", title=entry.name)
    for version in reversed(entry.versions):
        live = "live" if version.digest == entry.live else ""
        findings = judge_published(entry.name, version, catalog, Rules())
        state = findings[0].code if findings else version.state
        size = f"{version.size_bytes / 1e6:.1f} MB"
        row = (version.short, live, str(version.rank), size, version.template, state, version.published_at)
        table.add_row(*row)
    out.print(table)
    for event in entry.history:
        out.print(f"{event.at}  {event.what:8}  {event.digest[:12]}")


def _print_json(body: Any) -> None:
    print(json.dumps(body, ensure_ascii=False, indent=2))
