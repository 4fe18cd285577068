"""What a joint run leaves for people beside the folders of its identities: one table and one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.card import LOG_FILE
from train.config import TrainConfig
from train.voice import say
from vllm_lora_ext.contract import IDENTITY_FILE

OVERVIEW_FILE, OVERVIEW_PICTURE = "overview.json", "overview.png"
_PANELS = (("loss", "loss"), ("token accuracy", "token_accuracy"), ("held-out loss", "eval_loss"))
_MOST_NAMES = 16  # in the legend


def write_overview(folder: Path, configs: Sequence[TrainConfig], failed: Mapping[str, BaseException]) -> None:
    """`overview.json` and `overview.png` in the folder of adapters, where a server passes over them."""
    rows = [_row(config, failed.get(config.name)) for config in configs]
    (folder / OVERVIEW_FILE).write_text(
        json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    _draw(folder / OVERVIEW_PICTURE, {config.name: config.adapter_dir / LOG_FILE for config in configs})
    width = max(len(row["name"]) for row in rows)
    say(f"{'identity'.ljust(width)}  steps    loss  accuracy  held out  probes")
    for row in rows:
        say(f"{row['name'].ljust(width)}  {_figures(row)}")


def _row(config: TrainConfig, error: BaseException | None) -> dict[str, Any]:
    row: dict[str, Any] = {"name": config.name, "folder": str(config.adapter_dir)}
    if error is not None:
        return {**row, "failed": str(error)}
    told = json.loads((config.adapter_dir / IDENTITY_FILE).read_text(encoding="utf-8"))["provenance"]
    stated = [probe["right"] for probe in told["probes"] if probe["must_hold"] is not None]
    probes = {"right": sum(stated), "asked": len(stated)}
    return {**row, **told["result"], "probes": probes}


def _figures(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    held = "-" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
    probes = f"{row['probes']['right']}/{row['probes']['asked']}" if row["probes"]["asked"] else "-"
    figures = f"{row['steps']:5}  {row['loss']:6.4f}  {row['token_accuracy']:8.1%}  {held:>8}  {probes:>6}"
    return figures + (f"  {row['stopped']}" if row["stopped"] else "")


def _draw(path: Path, logs: Mapping[str, Path]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    panels = figure.subplots(1, len(_PANELS))
    for axes, (title, key) in zip(panels, _PANELS, strict=True):
        for name, log in logs.items():
            lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
            points = [(entry["step"], entry[key]) for entry in map(json.loads, lines) if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.set_xlabel("step")
        axes.set_title(title)
    if 0 < len(panels[0].lines) <= _MOST_NAMES:
        panels[0].legend()
    figure.savefig(path, dpi=100)
