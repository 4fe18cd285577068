"""Answers of all replicas made one: pages of metrics, and the list of adapters. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{.*\})?( .+)$")
_STATES = ("slot", "cached", "stored")  # the best of them is what a name has somewhere


def merged_metrics(pages: Mapping[str, str]) -> str:
    """One page of metrics in Prometheus' text format, every sample with the label `replica`.

    `pages` are those of the replicas. Families stay together, as the format wants it.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, page in sorted(pages.items()):
        family = ""
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                family = line.split(" ", 3)[2]
                known = heads.setdefault(family, [])
                if not any(head.split(" ", 3)[1:3] == line.split(" ", 3)[1:3] for head in known):
                    known.append(line)
            elif (match := _SAMPLE.match(line)) is not None:
                samples.setdefault(family, []).append(_labelled(match, replica))
    lines = [line for family in heads for line in (*heads[family], *samples.get(family, ()))]
    return "\n".join([*lines, *samples.get("", ()), ""])


def _labelled(match: re.Match[str], replica: str) -> str:
    name, labels, value = match.groups()
    others = "," + labels[1:-1] if labels and labels != "{}" else ""
    return f'{name}{{replica="{replica}"{others}}}{value}'


def merged_adapter(views: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One adapter as all replicas see it together; each has to show the same name."""
    first = dict(views[0])
    for key in ("requests", "running", "waiting"):
        first[key] = sum(view.get(key) or 0 for view in views)
    first["last_used"] = max((view.get("last_used") or "" for view in views), default="") or None
    states = [view.get("state") for view in views]
    first["state"] = next((state for state in _STATES if state in states), first.get("state"))
    loads = [view["load_seconds"] for view in views if view.get("load_seconds") is not None]
    first["load_seconds"] = loads[-1] if loads else None
    return first


def merged_adapters(lists: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """`GET /v1/adapters` of the whole fleet."""
    views: dict[str, list[Mapping[str, Any]]] = {}
    for body in lists:
        for view in body.get("data", ()):
            views.setdefault(view["id"], []).append(view)
    return {"object": "list", "data": [merged_adapter(views[name]) for name in sorted(views)]}
