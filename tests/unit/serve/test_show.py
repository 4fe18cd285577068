"""`vllm-lora show DIR`: what is printed of an adapter's modules, and of a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.cli import main
from serve.show_trace import module_tables, next_table, short, stream_table
from tests.conftest import lora_tensors
from train.trace import ModuleTrace, NextToken, StreamTrace, Trace

MakeAdapter = Callable[..., Path]
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def shown(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    assert main(["show", *argv]) == code
    return capsys.readouterr().out


def data(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    return json.loads(shown(capsys, *argv, "--json", code=code))


def test_modules_are_told_by_kind(make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, str(make_adapter()))
    rows = [line.split("│")[1].strip() for line in text.splitlines() if "8 x" in line]
    assert rows == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert "14 modules, 14,848 parameters" in text
    assert "8 x 96" in text and "dead" not in text and "note" not in text


def test_each_module_has_a_row_when_asked(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = lora_tensors()
    tensors[f"{Q}.lora_B.weight"][:] = 0
    folder = str(make_adapter(tensors=tensors))
    text = shown(capsys, folder, "--modules")
    assert text.count("model.layers.") == 14
    (dead,) = [line for line in text.splitlines() if "dead" in line]
    assert "model.layers.1.self_attn.q_proj" in dead
    assert "dead" in shown(capsys, folder)


def test_json_has_every_module_beside_what_it_had(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    body = data(capsys, str(make_adapter()))
    assert {"adapter", "state", "findings", "chat", "tensors"} <= set(body)
    assert len(body["modules"]) == 14 and body["other_tensors"] == []
    module = next(item for item in body["modules"] if item["module"].endswith("1.mlp.down_proj"))
    a, b = (lora_tensors()[f"base_model.model.{module['module']}.lora_{side}.weight"] for side in "AB")
    assert module["delta_norm"] == pytest.approx(np.linalg.norm(2 * b.astype(float) @ a))
    assert (module["a_shape"], module["b_shape"], module["scaling"]) == ([8, 96], [64, 8], 2)


def test_a_refused_adapter_is_looked_into_all_the_same(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    magnitude = {f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}
    folder = str(make_adapter(use_dora=True, tensors={**lora_tensors(), **magnitude}))
    assert "1 x DoRA magnitude: 64 parameters (0.4%), for example" in shown(capsys, folder, code=2)
    other = str(make_adapter("odd", tensors={"x": np.ones(3, np.float32)}))
    assert "1 x no LoRA matrix" in shown(capsys, other, code=2)
    odd_rank = str(make_adapter("rank", r="four"))
    assert all(module["scaling"] is None for module in data(capsys, odd_rank, code=2)["modules"])


def test_what_cannot_be_read_has_no_modules(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_adapter()
    (folder / "adapter_model.safetensors").write_bytes(b"cut")
    body = data(capsys, str(folder), code=2)
    assert body["modules"] == [] and body["findings"]


def test_show_of_a_folder_needs_no_torch(make_adapter: MakeAdapter) -> None:
    code = (
        "import sys; from serve.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "show", str(make_adapter())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flag", [["--modules"], ["--trace", "hello"]])
def test_a_published_name_cannot_be_looked_into(
    flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "helper", *flag, "--state-dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert flag[0] in told and "folder" in told


def test_a_trace_needs_a_text_and_an_adapter_that_may_be_used(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(make_adapter()), "--trace", " "]) == 2
    assert "--trace" in capsys.readouterr().err
    assert main(["show", str(make_adapter("dora", use_dora=True)), "--trace", "hello"]) == 2
    assert "feature_unsupported" in capsys.readouterr().err
    assert main(["show", "./nowhere", "--trace", "hello"]) == 2
    assert "no such folder" in capsys.readouterr().err


def cells(table: Any) -> list[list[str]]:
    columns = [list(column.cells) for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def trace(*modules: ModuleTrace) -> Trace:
    token, other = NextToken(1, "\n", 0.75), NextToken(2, " 好", 0.00012)
    stream = StreamTrace("model.layers.0", 0, 2.0, 3.0, 1.0)
    return Trace("<user>hi", 2, modules, (stream,), (token,), (other, token), 0.5)


def test_a_trace_has_a_row_for_each_layer_and_four_kinds_to_a_table() -> None:
    kinds = ("down_proj", "q_proj", "o_proj", "v_proj", "k_proj")
    modules = [
        ModuleTrace(f"model.layers.{layer}.{kind}", layer, 2.0, 0.5, 0.25)
        for layer in (0, 10)
        for kind in kinds
    ]
    attention, mlp = module_tables(trace(*modules, ModuleTrace("lm_head", None, 0.0, 0.0, None)))
    assert [column.header for column in attention.columns] == [
        "layer",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert cells(attention)[1] == ["10", *["2.00+0.50 25%"] * 4]
    assert cells(mlp) == [["0", "2.00+0.50 25%", ""], ["10", "2.00+0.50 25%", ""], ["-", "", "0+0 0%"]]


def test_experts_of_one_layer_share_a_cell() -> None:
    sizes = (3.0, 4.0)
    modules = [
        ModuleTrace(f"model.layers.0.mlp.experts.{i}.up_proj", 0, size, 0.0, 0.0)
        for i, size in enumerate(sizes)
    ]
    (table,) = module_tables(trace(*modules))
    assert cells(table) == [["0", "3.54+0 0%"]]


def test_streams_and_next_tokens_are_told() -> None:
    assert cells(stream_table(trace())) == [["0", "2.00", "3.00", "1.00 50%"]]
    assert cells(next_table(trace())) == [["'\\n'", "75%", "' 好'", "0.012%"], ["", "", "'\\n'", "75%"]]


def test_a_size_takes_five_characters_at_most() -> None:
    sizes = [0, 1e-30, 0.0099, 0.01, 9.994, 9.996, 99.96, 1234.5, 9999.6, 1e20]
    texts = [short(size) for size in sizes]
    assert texts == ["0", "1e-30", "1e-02", "0.01", "9.99", "10.0", "100", "1234", "1e+04", "1e+20"]
