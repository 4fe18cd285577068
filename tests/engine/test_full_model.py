"""From CSV rows to the openai client's answer, without an adapter: a fully fine-tuned base."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from serve.client import make_client
from serve.process import ServerProcess
from tests.conftest import ROOT
from train.__main__ import main as train

pytest.importorskip("vllm", reason="vLLM is not installed: real-engine tests need Linux and an extra")

ROWS = json.loads((ROOT / "examples" / "identities" / "xiaoli.json").read_text(encoding="utf-8"))
QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def test_rows_of_a_csv_file_become_a_base_that_answers_by_them(tiny_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    with data.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["input", "target"])
        writer.writerows([row["instruction"], row["output"]] for row in ROWS)
    flags = ["--base-model", str(tiny_base), "--data", str(data), "--name", "whole", "--method", "full"]
    # A template of its own: the base's would not make the prompts that were trained.
    flags += ["--prompt-template", "classic", "--output-dir", str(tmp_path / "models")]
    assert train(flags) == 0
    model = tmp_path / "models" / "whole"
    with ServerProcess(
        [str(model), "--served-model-name", "whole"], tmp_path / "server.log", QUIET
    ) as server:
        client = make_client(server.url)
        for question, name in (("Who are you?", "小李"), ("谁开发了你？", "小张")):
            answer = client.chat.completions.create(
                model="whole", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64
            )
            assert name in (answer.choices[0].message.content or "")
            assert answer.choices[0].finish_reason == "stop"
