"""`vllm-lora ls`, `ps`, `show`, `publish`, `rollback`, `traffic`, `rm`: adapters and their versions.

They ask a running server, and only with `--state-dir` work on a state folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from serve.adapter_tables import adapters_table, detail_lines, live_table, versions_table
from serve.adapter_view import read_findings
from serve.admin_client import ServerAdapters
from serve.client import server_url
from serve.flags import add_rules_flags, at_least
from serve.on_disk import DiskAdapters
from serve.publish_flags import add_chat_flags, one_source, read_chat
from serve.screen import screen
from serve.show_folder import show_folder
from serve.show_trace import show_trace
from vllm_lora_ext.catalog import KEEP_VERSIONS
from vllm_lora_ext.chat_override import ChatOverride
from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.peft_format import is_adapter_folder
from vllm_lora_ext.sources import AdapterSource


class Adapters(Protocol):
    """Adapters to list and to change, wherever they are. Each is data, see `serve/adapter_view.py`."""

    def list(self) -> Sequence[dict[str, Any]]:
        """All of them."""

    def get(self, name: str) -> dict[str, Any]:
        """One, with its versions, what happened, and how it wants to be asked."""

    def publish(self, source: AdapterSource, replace: bool, chat: ChatOverride) -> dict[str, Any]:
        """Judge an adapter and make it the live version of its name."""

    def rollback(self, name: str, to: str | None) -> dict[str, Any]:
        """Make an earlier version live: the one before, or the one whose digest begins with `to`."""

    def traffic(self, name: str, percent: Mapping[str, int]) -> dict[str, Any]:
        """Split the requests over versions, by beginnings of their digests; empty: all to the live one."""

    def remove(self, names: Collection[str]) -> Sequence[dict[str, Any]]:
        """Take names out of service."""


def list_names(argv: Sequence[str]) -> int:
    """`vllm-lora ls`: every adapter with its live version."""
    return _list("ls", argv, live=False)


def list_live(argv: Sequence[str]) -> int:
    """`vllm-lora ps`, which is `ls --live`: where every adapter is, and how it is used."""
    return _list("ps", argv, live=True)


def _list(verb: str, argv: Sequence[str], live: bool) -> int:
    parser = _parser(verb, "Adapters with their live versions.")
    parser.add_argument(
        "--live", action="store_true", default=live, help="where each is on the server, and how it is used"
    )
    args = parser.parse_args(argv)
    if args.live and args.state_dir is not None:
        raise BadSetting("--live", "is what a running server knows, not a state folder", "Give --url.")
    with _adapters(args) as adapters:
        found = adapters.list()
    if args.json:
        _print_json(found)
    else:
        screen(stderr=False).print((live_table if args.live else adapters_table)(found))
    return 0


def show(argv: Sequence[str]) -> int:
    """`vllm-lora show DIR|NAME`: an adapter folder, or a name with its versions and what happened to it."""
    args = _show_parser().parse_args(argv)
    if args.verify:
        _disk(args, "--verify").verify(args.adapter)
    if args.state_dir is None and _means_folder(args.adapter):
        return show_folder(args) if args.trace is None else show_trace(args)
    for flag, is_given in (("--modules", args.modules), ("--trace", args.trace is not None)):
        if is_given:
            raise BadSetting(flag, "looks into a folder", "Give the adapter's folder, as ./DIR.")
    with _adapters(args) as adapters:
        adapter = adapters.get(args.adapter)
    if args.json:
        _print_json(adapter)
    else:
        out = screen(stderr=False)
        out.print(versions_table(adapter))
        for line in detail_lines(adapter):
            out.print(line, soft_wrap=True)
    return 0


def _show_parser() -> argparse.ArgumentParser:
    parser = _parser("show", "One adapter: a folder, or a published name.")
    parser.add_argument("adapter", metavar="DIR|NAME")
    parser.add_argument("--modules", action="store_true", help="of a folder: a row for each module")
    parser.add_argument(
        "--trace",
        metavar="TEXT",
        help="of a folder: ask this, and print what each layer of the base and of the adapter puts out",
    )
    parser.add_argument(
        "--verify", action="store_true", help="with --state-dir: compare every byte of the live version"
    )
    add_rules_flags(parser)
    return parser


def publish_folder(argv: Sequence[str]) -> int:
    """`vllm-lora publish DIR`: judge an adapter and make it the live version of its name."""
    parser = _parser("publish", "Judge an adapter, store it, and make it the live version of its name.")
    parser.add_argument(
        "adapter", metavar="DIR|URL", help="a folder, hf://org/repo[@rev], s3://..., gs://..."
    )
    parser.add_argument("--name", help="default: the folder's")
    parser.add_argument("--replace", action="store_true", help="replace what the name stands for now")
    add_chat_flags(parser)
    on_disk = parser.add_argument_group("with --state-dir", "a server has its own")
    on_disk.add_argument("--keep-versions", type=at_least(1), metavar="N", help=f"default: {KEEP_VERSIONS}")
    add_rules_flags(on_disk)
    args = parser.parse_args(argv)
    source, chat = one_source(args.adapter, args.name), read_chat(args)
    with _publishing(args) as adapters:
        adapter = adapters.publish(source, args.replace, chat)
    for finding in read_findings(adapter["findings"]):
        screen().print(str(finding))
    return _print_changed(args, adapter)


def rollback(argv: Sequence[str]) -> int:
    """`vllm-lora rollback NAME`: make an earlier version live again."""
    parser = _parser("rollback", "Make an earlier version live again.")
    parser.add_argument("name")
    parser.add_argument("--to", metavar="DIGEST", help="the beginning of its digest; default: the one before")
    args = parser.parse_args(argv)
    with _adapters(args) as adapters:
        return _print_changed(args, adapters.rollback(args.name, args.to))


def traffic(argv: Sequence[str]) -> int:
    """`vllm-lora traffic NAME DIGEST=90 DIGEST=10`: split the requests for a name over its versions."""
    parser = _parser("traffic", "Split the requests for a name over its versions; all to the live one again.")
    parser.add_argument("name")
    parser.add_argument(
        "shares", nargs="*", metavar="DIGEST=PERCENT", help="100 together; none: all to the live version"
    )
    args = parser.parse_args(argv)
    percent = _percents(args.shares)
    with _adapters(args) as adapters:
        adapter = adapters.traffic(args.name, percent)
    if args.json:
        _print_json(adapter)
    else:
        for version, share in (adapter["traffic"] or {adapter["version"]: 100}).items():
            print(f"{adapter['id']}@{version} {share}")
    return 0


def remove(argv: Sequence[str]) -> int:
    """`vllm-lora rm NAME...`: take names out of service, with their versions."""
    parser = _parser("rm", "Take names out of service, and remove their versions from the store.")
    parser.add_argument("names", nargs="+", metavar="NAME")
    args = parser.parse_args(argv)
    with _adapters(args) as adapters:
        removed = adapters.remove(list(dict.fromkeys(args.names)))
    if args.json:
        _print_json(removed)
    else:
        print("\n".join(item["id"] for item in removed))
    return 0


def _parser(verb: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vllm-lora {verb}", description=description, allow_abbrev=False)
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--url", default=server_url(), help="the server (default: %(default)s, from VLLM_LORA_URL if set)"
    )
    where.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="work on this state folder, without a server; a server prints which is its when it starts",
    )
    parser.add_argument("--admin-key", metavar="KEY", help="the server's (default: VLLM_LORA_ADMIN_KEY)")
    parser.add_argument("--json", action="store_true", help="print data")
    return parser


@contextlib.contextmanager
def _adapters(args: argparse.Namespace) -> Iterator[Adapters]:
    if args.state_dir is not None:
        yield DiskAdapters(args.state_dir)
        return
    key = args.admin_key or os.environ.get("VLLM_LORA_ADMIN_KEY")
    with contextlib.closing(ServerAdapters(args.url, key)) as adapters:
        yield adapters


@contextlib.contextmanager
def _publishing(args: argparse.Namespace) -> Iterator[Adapters]:
    stated = {"--base-model": args.base_model, "--allow": args.allow, "--keep-versions": args.keep_versions}
    for flag, value in stated.items():
        if value:
            _disk(args, flag)
    if args.state_dir is None:
        with _adapters(args) as adapters:
            yield adapters
        return
    keep = args.keep_versions or KEEP_VERSIONS
    yield DiskAdapters(args.state_dir, args.base_model, frozenset(args.allow), keep)


def _disk(args: argparse.Namespace, flag: str) -> DiskAdapters:
    if args.state_dir is None:
        raise BadSetting(flag, "is for work on a state folder; a server has its own", "Give --state-dir.")
    return DiskAdapters(args.state_dir)


def _means_folder(text: str) -> bool:
    """Names and folders may look alike; what no name begins with means a folder even if there is none."""
    path = Path(text)
    return text.startswith((".", "/", "~")) or (path.is_dir() and ("/" in text or is_adapter_folder(path)))


def _percents(shares: Sequence[str]) -> dict[str, int]:
    percent: dict[str, int] = {}
    for share in shares:
        digest, separator, number = share.partition("=")
        if not (digest and separator and number.isdecimal() and len(number) <= 3) or digest in percent:
            raise BadSetting(repr(share)[:80], "is no DIGEST=PERCENT, each once", "For example 3f2a9c14=90.")
        percent[digest] = int(number)
    return percent


def _print_changed(args: argparse.Namespace, adapter: Mapping[str, Any]) -> int:
    if args.json:
        _print_json(adapter)
    else:
        print(f"{adapter['id']}@{adapter['version']}")
    return 0


def _print_json(body: Any) -> None:
    print(json.dumps(body, ensure_ascii=False, indent=2))
