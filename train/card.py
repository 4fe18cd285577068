"""What a run leaves beside the weights for people: model card, log and picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CARD_FILE = "README.md"
LOG_FILE = "training_log.jsonl"
PICTURE_FILE = "training.png"
_KINDS = {"lora": "LoRA", "qlora": "LoRA", "dora": "DoRA"}


def write_log(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """`training_log.jsonl`: one log record a line, in order of steps."""
    lines = [json.dumps(dict(entry), ensure_ascii=False) for entry in history]
    (folder / LOG_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def draw(folder: Path, history: Sequence[Mapping[str, float]], title: str) -> None:
    """`training.png`: loss, token accuracy and learning rate over the steps."""
    from matplotlib.figure import Figure

    panels = (
        ("loss", ("loss", "eval_loss")),
        ("token accuracy", ("token_accuracy", "eval_token_accuracy")),
        ("learning rate", ("learning_rate",)),
    )
    figure = Figure(figsize=(12, 3.6))
    figure.suptitle(title)
    figure.subplots_adjust(left=0.05, right=0.98, bottom=0.14, top=0.84, wspace=0.18)
    for axes, (label, keys) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                name = "held out" if key.startswith("eval") else "training"
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_xlabel("step")
        axes.set_title(label)
        if len(keys) > 1 and axes.lines:
            axes.legend()
    figure.savefig(folder / PICTURE_FILE, dpi=100)


def write_card(
    folder: Path, name: str, provenance: Mapping[str, Any], note: str | None, command: str
) -> None:
    """`README.md`: the model card, with the fields that the Hub reads in front."""
    base, result, data = (provenance[key] for key in ("base_model", "result", "data"))
    is_adapter = provenance["arguments"]["method"] != "full"
    front = {"base_model": base["name"], "library_name": "peft" if is_adapter else "transformers"}
    tags = [provenance["arguments"]["method"], "vllm-lora"]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items())]
    lines += [f"tags: {json.dumps(tags)}", "pipeline_tag: text-generation", "---", "", f"# {name}", ""]
    kind = f"A {_KINDS[tags[0]]} adapter of" if is_adapter else "A fine-tuned copy of"
    lines += [f"{kind} `{base['name']}`, made with vllm-lora.", ""]
    if note:
        lines += [f"> {note}.", ""]
    lines += ["| | |", "|---|---|"]
    figures = {
        "rows": data["rows"],
        "data, SHA-256": f"`{data['sha256']}`",
        "steps": result["steps"],
        "loss": _rounded(result["loss"]),
        "token accuracy": _rounded(result["token_accuracy"]),
        "held-out loss": _rounded(result["eval_loss"]),
        "held-out token accuracy": _rounded(result["eval_token_accuracy"]),
        "seed": provenance["seed"],
    }
    lines += [f"| {key} | {value} |" for key, value in figures.items() if value is not None]
    lines += ["", f"![loss, token accuracy and learning rate]({PICTURE_FILE})", "", "## Probes", ""]
    for probe in provenance["probes"]:
        lines += [f"- **{_one_line(probe['question'])}** {_one_line(probe['answer'])}"]
    lines += ["", "## Serve it", "", "```sh", command, "```", "", "All settings are in `identity.json`.", ""]
    (folder / CARD_FILE).write_text("\n".join(lines), encoding="utf-8")


def _rounded(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
