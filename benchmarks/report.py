"""What a benchmark leaves: one JSON line on stdout, and the same in a file with its settings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def result_name(machine: Mapping[str, Any], theme: str) -> str:
    """`<theme>_<hardware>_<date>`; `machine` as `describe_machine` tells it."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.*)$", info.read_text() if info.is_file() else "", re.MULTILINE)
    words = re.findall(r"epyc|xeon|ryzen|core|neoverse|graviton", (model[1] if model else "").lower())
    hardware = words[0] if words else machine["machine"]
    return f"{theme}_{hardware}-{machine['cores']}-cores_{datetime.now(UTC):%Y-%m-%d}"


def tell(report: Mapping[str, Any], place: Path | None = None) -> None:
    """Write `report` to `place`, whose folder is made, and print it as the last line."""
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {place}", file=sys.stderr)
    print(json.dumps(report))
