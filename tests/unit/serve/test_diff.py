"""`vllm-lora diff A B`: what it says of two folders, as tables and as data, and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from serve.cli import main
from tests.conftest import lora_tensors

MakeAdapter = Callable[..., Path]
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def told(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    assert main(["diff", *map(str, argv)]) == code
    return capsys.readouterr().out


def data(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> Any:
    return json.loads(told(capsys, *argv, "--json", code=code))


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main(["diff", *map(str, argv)]) == 2
    return capsys.readouterr().err


def changed() -> dict[str, np.ndarray]:
    """As `lora_tensors`, with one module's B twice as large."""
    tensors = lora_tensors()
    tensors[f"{Q}.lora_B.weight"] *= 2
    return tensors


def test_the_same_adapter_twice_is_no_difference(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_adapter("one"), make_adapter("other")
    text = told(capsys, one, other, "--exit-code")
    assert "config and chat settings: the same" in text and "all: 14 of 14 modules the same" in text
    assert text.splitlines()[-1] == "no difference"
    assert data(capsys, one, other)["differs"] is False


def test_exit_code_is_1_only_when_it_is_asked_for(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_adapter("one"), make_adapter("other", tensors=changed())
    assert told(capsys, *folders).splitlines()[-1] == "the two differ"
    told(capsys, *folders, "--exit-code", code=1)
    assert data(capsys, *folders, "--exit-code", code=1)["differs"] is True


def test_modules_are_told_by_kind_or_each(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = make_adapter("one"), make_adapter("other", tensors=changed())
    text = told(capsys, *folders)
    (row,) = [line for line in text.splitlines() if "│ q_proj" in line]
    assert "1 same" in row and "note" not in text
    each = told(capsys, *folders, "--modules")
    assert each.count("model.layers.") == 14
    (row,) = [line for line in each.splitlines() if "layers.1.self_attn.q_proj" in line]
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    norm = np.linalg.norm(2.0 * lora_tensors()[f"{Q}.lora_B.weight"] @ lora_tensors()[f"{Q}.lora_A.weight"])
    assert cells[1:3] == ["differs", f"{norm:.3g} / {2 * norm:.3g}"]
    assert cells[3:] == [f"{norm:.3g} (50%)", "1.000", "1.00 / 0.12", "1.00 / 0.12"]
    assert "each module: rank 8, scaling 2" in each


def test_data_has_everything(make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    first = make_adapter("one")
    second = make_adapter("other", tensors=changed(), alpha_pattern={"k_proj": 4}, lora_dropout=0.5)
    body = data(capsys, first, second)
    assert body["first"] == {"adapter": str(first), "peft_type": "LORA"}
    assert body["base"] == {"first": "base", "second": "base", "state": "same"}
    assert [(item["name"], item["counts"]) for item in body["config"]] == [
        ("alpha_pattern", False),
        ("lora_dropout", False),
    ]
    assert body["chat"] == [] and body["answers"] == []
    modules = {item["module"].split("layers.")[1]: item for item in body["weights"]["modules"]}
    assert modules["0.self_attn.k_proj"]["scalings"] == [2.0, 0.5]
    assert modules["1.self_attn.q_proj"]["relative"] == pytest.approx(0.5)
    assert modules["0.self_attn.q_proj"]["state"] == "same" and len(modules) == 14


def test_chat_settings_are_told_with_the_lines_of_the_template(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_adapter("one"), make_adapter("other")
    one.joinpath("chat_template.jinja").write_text("head\n{{ messages[0].content }}\nend")
    other.joinpath("chat_template.jinja").write_text("head\n{{ messages[-1].content }}\nend")
    other.joinpath("identity.json").write_text(json.dumps({"system_prompt": "Be kind.", "stop": ["END"]}))
    other.joinpath("generation_config.json").write_text(json.dumps({"temperature": 0.3}))
    text = told(capsys, one, other, "--exit-code", code=1)
    assert "-{{ messages[0].content }}\n+{{ messages[-1].content }}" in text
    assert "'Be kind.'" in text and "END" in text and "temperature" in text
    names = [item["name"] for item in data(capsys, one, other)["chat"]]
    assert names == ["chat_template", "system_prompt", "stop", "temperature"]
    other.joinpath("chat_template.jinja").write_text("head\n{{ messages[0].content }}\nend\n")
    assert "only the ends of lines differ" in told(capsys, one, other)


def test_modules_that_one_side_lacks_and_other_ranks_are_told(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    fewer = {name: value for name, value in lora_tensors(rank=4).items() if "q_proj" in name}
    other = make_adapter("other", tensors=fewer, r=4, use_rslora=True, target_modules=["q_proj"])
    text = told(capsys, make_adapter("one"), other)
    assert text.count("2 only in the first") == 6 and "2 differs" in text
    assert all(f"│ {both} " in text for both in ("8/4", "2/8", "8/-"))
    assert "use_rslora" in text and "seen in the modules" in text


def test_bases_that_are_not_one_are_told(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str], base_folder: Path
) -> None:
    larger = tmp_path / "larger"
    larger.mkdir()
    config = json.loads((base_folder / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": 1024}))
    one = make_adapter("one")
    other = make_adapter("other", base_model_name_or_path=str(larger))
    assert "bases: not the same" in told(capsys, one, other, "--exit-code", code=1)
    unknown = make_adapter("unknown", base_model_name_or_path="org/nowhere")
    assert "cannot be told" in told(capsys, one, unknown, "--exit-code")
    for second in (other, unknown):
        assert "--base-model" in refused(capsys, one, second, "--prompt", "hello")


def test_shapes_of_another_base_have_a_note(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {
        name: np.concatenate([value, value], axis=1 if "lora_A" in name else 0)
        for name, value in lora_tensors().items()
    }
    text = told(capsys, make_adapter("one"), make_adapter("wide", tensors=wide))
    assert "64 x 64 against 128 x 128: not of one base" in text
    assert "14 modules could not be compared" in text


def test_another_peft_type_is_told_and_not_compared(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_adapter("one")
    loha = make_adapter("loha", tensors={f"{Q}.hada_w1_a": np.ones((4, 2))}, peft_type="LOHA", alpha=8)
    text = told(capsys, one, loha, "--exit-code", code=1)
    assert "modules: not compared, for the first is LORA and the second LOHA" in text
    assert data(capsys, loha, one)["weights"] is None
    text = told(capsys, loha, loha, "--exit-code")
    assert "both are LOHA" in text and "weights: the same" in text
    (loha / "adapter_model.safetensors").rename(loha / "adapter_model.bin")
    assert "holds no adapter_model.safetensors" in refused(capsys, loha, loha)
    told(capsys, one, loha)  # whose weights nobody asked for


def test_what_no_server_takes_is_compared_all_the_same(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    magnitude = {f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}
    dora = make_adapter("dora", use_dora=True, tensors={**lora_tensors(), **magnitude})
    text = told(capsys, make_adapter("one"), dora)
    assert "DoRA magnitude" in text and "only in the second" in text and "use_dora" in text


def test_bad_input_ends_with_2(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_adapter("one")
    assert "no such folder" in refused(capsys, one, tmp_path / "nowhere")
    assert "adapter_config.json" in refused(capsys, tmp_path, one)
    broken = make_adapter("broken")
    (broken / "adapter_model.safetensors").write_bytes(b"cut")
    assert "weights_corrupt" in refused(capsys, one, broken)
    assert "rank_invalid" in refused(capsys, make_adapter("rank", r="four"), one)
    (broken / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused(capsys, broken, one)
    (broken / "adapter_config.json").write_text("{}")
    assert "peft_type" in refused(capsys, broken, one)
    odd_chat = make_adapter("odd")
    (odd_chat / "identity.json").write_text('{"stop": 7}')
    assert "identity.json" in refused(capsys, odd_chat, one)


def test_flags_of_answers_need_a_prompt_and_prompts_a_text(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make_adapter("one")
    for flag in (["--base-model", "x"], ["--max-tokens", "4"], ["--allow", "x"]):
        assert f"{flag[0]}: is for answers" in refused(capsys, one, one, *flag)
    prompts = tmp_path / "prompts.txt"
    assert "cannot be read" in refused(capsys, one, one, "--prompts", prompts)
    prompts.write_text("\n  \n")
    assert "holds no prompt" in refused(capsys, one, one, "--prompts", prompts)
    prompts.write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused(capsys, one, one, "--prompts", prompts)
    assert "has no text" in refused(capsys, one, one, "--prompt", " ")


def test_versions_of_a_state_folder_are_compared(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, digests = tmp_path / "state", []
    one, other = make_adapter("one"), make_adapter("other", tensors=changed())
    other.joinpath("identity.json").write_text(json.dumps({"system_prompt": "Be kind."}))
    for folder, flags in ((one, []), (other, ["--replace"])):
        assert main(["publish", str(folder), "--name", "it", "--state-dir", str(state), *flags]) == 0
        digests.append(capsys.readouterr().out.strip().partition("@")[2])
    body = data(capsys, f"it@{digests[0]}", "it", "--state-dir", state)
    assert [body[side]["adapter"] for side in ("first", "second")] == [f"it@{digest}" for digest in digests]
    assert [item["name"] for item in body["chat"]] == ["system_prompt"]
    assert body["config"] == [] and body["base"]["state"] == "same"
    assert [item["state"] for item in body["weights"]["modules"]].count("differs") == 1
    told(capsys, "it", f"it@{digests[1][:6]}", "--state-dir", state, "--exit-code")
    assert "nobody" in refused(capsys, "it", "nobody", "--state-dir", state)
    assert "no such state folder" in refused(capsys, "it", "it", "--state-dir", tmp_path / "nowhere")


def test_diff_of_folders_needs_no_torch(make_adapter: MakeAdapter) -> None:
    code = (
        "import sys; from serve.cli import main; code = main(sys.argv[1:]);"
        "assert not {'torch', 'vllm', 'transformers', 'peft'} & set(sys.modules); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "diff", str(make_adapter("one")), str(make_adapter("other"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_many_other_tensors_are_counted(
    make_adapter: MakeAdapter, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = make_adapter("one"), make_adapter("other")
    biases = {f"base_model.model.model.layers.0.odd{i}.bias": np.ones(2, np.float32) for i in range(11)}
    save_file({**lora_tensors(), **biases}, other / "adapter_model.safetensors")
    text = told(capsys, one, other)
    assert text.count("bias, base_model") == 8 and "and 3 more tensors" in text
