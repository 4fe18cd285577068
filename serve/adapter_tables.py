"""How adapters are shown to people: tables and lines of what `serve/adapter_view.py` makes data of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from serve.adapter_view import PROOF, read_findings
from vllm_lora_ext.parity import lines as proof_lines
from vllm_lora_ext.spec import printable

_LIVE_ONLY = ("slot", "cached", "stored")  # states that say where it is, not whether it is served


def adapters_table(adapters: Sequence[Mapping[str, Any]]) -> Table:
    """What each adapter is, and what speaks against it."""
    table = Table("adapter", "version", "rank", "size", "template", "proof", "state", "reason")
    for adapter in adapters:
        state = adapter.get("admission") if adapter.get("state") in _LIVE_ONLY else adapter.get("state")
        what = (adapter.get("rank"), _size(adapter), adapter.get("template"), adapter.get("proof"), state)
        row = (adapter["id"], adapter.get("version"), *what, _reason(adapter))
        table.add_row(*map(_shown, row))
    return table


def live_table(adapters: Sequence[Mapping[str, Any]]) -> Table:
    """Where each adapter is on a running server, and how it is used."""
    columns = ("adapter", "version", "state", "requests", "running", "waiting", "last used", "load time")
    table = Table(*columns, "reason")
    for adapter in adapters:
        shown = [adapter.get(key) for key in ("id", "version", "state", "requests", "running", "waiting")]
        seconds = adapter.get("load_seconds")
        time = None if seconds is None else f"{float(seconds) * 1e3:.0f} ms"
        table.add_row(*map(_shown, (*shown, adapter.get("last_used"), time, _reason(adapter))))
    return table


def versions_table(adapter: Mapping[str, Any]) -> Table:
    """The versions of one adapter, as they came with it."""
    columns = ("version", "live", "traffic", "rank", "size", "template", "proof", "state", "published")
    table = Table(*columns, title=printable(str(adapter["id"])))
    shares = adapter.get("traffic") or {}
    for version in adapter.get("versions") or []:
        share = shares.get(version.get("version"))
        live = ("live" if version.get("live") else "", "" if share is None else f"{share} %")
        what = (version.get("rank"), _size(version), version.get("template"), version.get("proof"))
        row = (version.get("version"), *live, *what, version.get("state"), version.get("published_at"))
        table.add_row(*map(_shown, row))
    return table


def detail_lines(adapter: Mapping[str, Any]) -> Iterator[str]:
    """What happened to an adapter, what speaks against it, and how it wants to be asked."""
    for event in adapter.get("history") or []:
        yield f"{_shown(event.get('at'))}  {_shown(event.get('what')):8}  {_shown(event.get('version'))}"
    yield from map(str, read_findings(adapter.get("findings")))
    proof = (adapter.get("proofs") or {}).get(PROOF)
    if proof:
        yield from map(_shown, proof_lines(proof))
    chat = adapter.get("chat") or {}
    if chat.get("system_prompt") is not None:
        yield f"system prompt: {_shown(chat['system_prompt'])}"
    if chat.get("stop"):
        yield f"stop: {', '.join(map(repr, chat['stop']))}"
    if chat.get("sampling"):
        yield f"sampling: {', '.join(f'{name}={value}' for name, value in chat['sampling'].items())}"
    if chat.get("template") is not None:
        yield "template:"
        yield from map(_shown, str(chat["template"]).split("\n"))


def _size(item: Mapping[str, Any]) -> str | None:
    size = item.get("size_bytes")
    return None if size is None else f"{float(size) / 1e6:.1f} MB"


def _reason(adapter: Mapping[str, Any]) -> str:
    return "\n".join(map(str, read_findings(adapter.get("findings"))))


def _shown(value: object) -> str:
    """Anything that a server may have sent, in a cell; findings are printable already."""
    return "-" if value is None else "\n".join(map(printable, str(value).split("\n")))
