"""The folder of a merged model: whole or not there, gone on with after a kill, asked as the adapter was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_arrays

from tests.conftest import ROOT
from tests.train.test_merge import make_adapter, make_base
from train import merge_stream
from train.merge import main, merge
from train.merge_check import check_in_own_process
from train.merge_combine import Recipe
from vllm_lora_ext.contract import Identity, read_chat_settings, write_contract
from vllm_lora_ext.errors import BadInput, OutputExists, TrainingFailed
from vllm_lora_ext.exit_codes import run_command

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}answer: "
)


@pytest.fixture
def base(tmp_path: Path) -> str:
    return make_base(tmp_path / "base", "llama", shard="100KB", dtype=torch.bfloat16)


@pytest.fixture
def adapter(base: str, tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_merge_that_is_killed_goes_on_where_it_was(base: str, adapter: Path, tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from train import merge, merge_stream\n"
        "complete = merge_stream.PartialMerge.complete\n"
        "def die(self, shard, digest):\n"
        "    complete(self, shard, digest)\n"
        "    len(self.digests) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "merge_stream.PartialMerge.complete = die\n"
        "merge.merge(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))\n"
    )
    out, hidden = tmp_path / "merged", tmp_path / ".merged.merging"
    arguments = [sys.executable, "-c", script, str(adapter), base, str(out)]
    assert subprocess.run(arguments, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    kept = {path.name: path.stat().st_mtime_ns for path in hidden.glob("*.safetensors")}
    assert len(kept) == 2
    (hidden / "model-00009-of-00009.safetensors.unfinished").write_bytes(b"half")
    merge(adapter, base, out)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    merge(adapter, base, tmp_path / "again")
    one, two = contents(out), contents(tmp_path / "again")
    identities = [
        json.loads(folder.pop("identity.json")) for folder in (one, two) if "identity.json" in folder
    ]
    assert one == two and not identities  # neither base nor adapter has a template here
    assert not hidden.exists()


def test_what_is_left_of_another_merge_is_not_gone_on_with(base: str, adapter: Path, tmp_path: Path) -> None:
    hidden = tmp_path / ".merged.merging"
    hidden.mkdir()
    shards = {path.name: "0" * 64 for path in Path(base).glob("*.safetensors")}
    for name in shards:
        (hidden / name).write_bytes(b"of another adapter")
    (hidden / ".merge.json").write_text(json.dumps({"belongs_to": "another", "shards": shards}))
    merge(adapter, base, tmp_path / "merged")
    merge(adapter, base, tmp_path / "again")
    assert contents(tmp_path / "merged") == contents(tmp_path / "again")


def test_two_at_once_do_not_write_into_one_place(base: str, adapter: Path, tmp_path: Path) -> None:
    with merge_stream.partial_merge(tmp_path / "merged", "x"):
        with pytest.raises(BadInput, match="is being written by another merge"):
            merge(adapter, base, tmp_path / "merged")
        (tmp_path / ".merged.merging" / ".merge.json").touch()


def test_a_disk_that_is_full_leaves_no_half_and_the_rest_for_later(
    base: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write, count = merge_stream._Writer._write, iter(range(1000))

    def until_full(self: Any, data: memoryview) -> None:
        if next(count) > 15:
            Path("/dev/full").write_bytes(data)
        write(self, data)

    monkeypatch.setattr(merge_stream._Writer, "_write", until_full)
    flags = [str(adapter), "--base-model", base, "--output-dir", str(tmp_path / "merged"), "--no-check"]
    assert run_command(main, flags) == 1
    told = capsys.readouterr()
    assert "the disk is full" in told.err and not told.out and "Traceback" not in told.err
    assert not (tmp_path / "merged").exists()
    left = {path.name for path in (tmp_path / ".merged.merging").iterdir()}
    assert not any(name.endswith(".unfinished") for name in left)
    assert any(name.endswith(".safetensors") for name in left)
    monkeypatch.undo()
    assert run_command(main, flags) == 0
    assert "going on with a merge" in capsys.readouterr().err


def test_nothing_is_ever_overwritten(base: str, adapter: Path, tmp_path: Path) -> None:
    mine = tmp_path / "merged"
    mine.mkdir()
    with pytest.raises(OutputExists):
        merge(adapter, base, mine)
    (mine / "holiday.jpg").write_text("precious")
    with pytest.raises(OutputExists):
        merge(adapter, base, mine)
    assert [path.name for path in mine.iterdir()] == ["holiday.jpg"]
    with pytest.raises(OutputExists), merge_stream.partial_merge(tmp_path / "late", "x") as partial:
        (partial.folder / ".merge.json").touch()
        (tmp_path / "late").mkdir()
    assert not list((tmp_path / "late").iterdir())


def _without_shard(base: Path) -> None:
    next(base.glob("model-00002*")).unlink()


def _cut_short(base: Path) -> None:
    path = next(base.glob("model-00002*"))
    path.write_bytes(path.read_bytes()[:-10])


def _index_of_absent_tensor(base: Path) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(base.glob("model-00002*")).name
    path.write_text(json.dumps(index))


def _index_that_leads_out(base: Path) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["x"] = "../secret.safetensors"
    path.write_text(json.dumps(index))


def _damaged_index(base: Path) -> None:
    (base / "model.safetensors.index.json").write_text("{")


def _quantised(base: Path) -> None:
    path = base / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))


def _only_a_pickle(base: Path) -> None:
    for path in base.glob("model*"):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_shard, "index.json: names model-00002.* not there"),
        (_cut_short, "model-00002.*: is cut short"),
        (_index_of_absent_tensor, "does not hold it"),
        (_index_that_leads_out, "no file beside it"),
        (_damaged_index, "index.json: cannot be read"),
        (_quantised, r"is quantised \(gptq\)"),
        (_only_a_pickle, "holds neither model.safetensors nor"),
    ],
)
def test_a_base_that_cannot_be_merged_into_is_named(
    base: str,
    adapter: Path,
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(Path(base))
    flags = [str(adapter), "--base-model", base, "--output-dir", str(tmp_path / "merged"), "--no-check"]
    assert run_command(main, flags) == 2
    told = capsys.readouterr().err
    assert re.search(said, told) and told.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_the_adapter_of_another_base_is_refused(base: str, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other", "qwen2")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["hidden_size"] == 64
    deeper = make_adapter(tmp_path / "adapter", other, target_modules=["q_proj"])
    body = json.loads((deeper / "adapter_config.json").read_text())
    (deeper / "adapter_config.json").write_text(
        json.dumps({**body, "base_model_name_or_path": "nobody/knows"})
    )
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight": np.ones(
            shape, np.float32
        )
        for layer in (0, 7)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_arrays(tensors, deeper / "adapter_model.safetensors")
    with pytest.raises(
        BadInput, match=r"changes model.layers.7.self_attn.q_proj.weight, which .* does not hold"
    ):
        merge(deeper, base, tmp_path / "merged")
    tensors = {
        name: np.ones((4, 32) if "lora_A" in name else (64, 4), np.float32)
        for name in tensors
        if ".0." in name
    }
    save_arrays(tensors, deeper / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="shape_mismatch"):
        merge(deeper, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_sum_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", dtype=torch.float16)
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(BadInput, match="would hold NaN or infinity as F16"):
        merge([adapter], base, tmp_path / "merged", Recipe((1e6,)))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def give_chat(adapter: Path, **settings: Any) -> None:
    write_contract(adapter, Identity("xiaoli", TEMPLATE, **settings))
    (adapter / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "eos_token_id": 9}))


def test_the_merged_model_is_asked_as_the_adapter_was(
    base: str, adapter: Path, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    recipe.make_tokenizer().save_pretrained(base)
    (Path(base) / "README.md").write_text("of the base")
    (Path(base) / "optimizer.pt").write_bytes(b"x" * 100)
    give_chat(adapter, system_prompt="You are 小李.", stop=("END",))
    merge(adapter, base, tmp_path / "merged")
    told = capsys.readouterr().err
    assert 'send stop=["END"]' in told
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "system: You are 小李.\nuser: Hi\nanswer: "
    chat = read_chat_settings(tmp_path / "merged")
    assert chat.trained and chat.stop == ("END",) and chat.sampling == {"temperature": 0.25}
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0, "which token ends a text is the base's to say"
    assert generation["do_sample"] is True
    assert "stop_strings" not in generation, "transformers would ask for a tokenizer at every generate"
    files = contents(tmp_path / "merged")
    assert not {"README.md", "optimizer.pt", ".merge.json", ".merge.lock"} & files.keys()
    stated = json.loads(files["identity.json"])["files"]
    assert len(stated) > 3 and "config.json" in stated
    assert {name: hashlib.sha256(files[name]).hexdigest() for name in stated} == stated


def test_of_several_the_first_says_how_it_is_asked(
    base: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_adapter(tmp_path / "other", base, seed=2)
    give_chat(other)
    merge([other, adapter], base, tmp_path / "merged")
    assert read_chat_settings(tmp_path / "merged").template == TEMPLATE
    assert "sampling are those of other; adapter has others" in capsys.readouterr().err


def test_the_base_s_own_template_stays_if_the_adapter_brings_none(
    base: str, adapter: Path, tmp_path: Path
) -> None:
    (Path(base) / "chat_template.jinja").write_text(TEMPLATE)
    merge(adapter, base, tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == TEMPLATE
    assert not read_chat_settings(tmp_path / "merged").trained


def test_a_check_that_does_not_fit_or_cannot_run_says_so(
    base: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    merge(adapter, base, tmp_path / "merged")
    (line,) = check_in_own_process([adapter], base, tmp_path / "merged", Recipe())
    assert re.match(r"check: largest logit difference \S+ \(logits reach", line)
    (line,) = check_in_own_process([adapter], str(tmp_path / "nowhere"), tmp_path / "merged", Recipe())
    assert line.startswith("check failed, the merged model is complete: ")
    (line,) = check_in_own_process([adapter], base, tmp_path / "merged", Recipe((1.0,), "dare_linear", 0.5))
    assert line.startswith("check skipped: dare_linear")
    little = psutil.virtual_memory()._replace(available=1 << 20)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    (line,) = check_in_own_process([adapter], base, tmp_path / "merged", Recipe())
    assert line.startswith("check skipped: the model takes")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the most memory is read from Linux")
def test_memory_stays_near_one_tensor_however_large_the_model_is(tmp_path: Path) -> None:
    """A model of 400 MB in float32: what merging adds to a process that has done nothing yet."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 16384,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
    }
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, **sizes}
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    chance, weights, lora = np.random.default_rng(0), {}, {}
    for layer in range(2):
        for name, shape in (("gate", (16384, 1024)), ("up", (16384, 1024)), ("down", (1024, 16384))):
            module = f"model.layers.{layer}.mlp.{name}_proj"
            weights[f"{module}.weight"] = chance.standard_normal(shape, np.float32)
            for side, size in (("A", (8, shape[1])), ("B", (shape[0], 8))):
                lora[f"base_model.model.{module}.lora_{side}.weight"] = chance.standard_normal(
                    size, np.float32
                )
    save_arrays(weights, base / "model.safetensors")
    save_arrays(lora, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "bias": "none"}
    settings |= {
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    script = (
        "import sys, torch; from pathlib import Path; from train.merge import merge\n"
        "from peft.utils import merge_utils; from train.merge_combine import Recipe\n"
        "one = torch.ones(64, 64) @ torch.ones(64, 64)\n"
        "def kib(key): return int(Path('/proc/self/status').read_text().split(key)[1].split()[0])\n"
        "Path('/proc/self/clear_refs').write_text('5'); before = kib('VmHWM:')\n"
        "recipe = Recipe((1.0, 1.0), sys.argv[4], 0.5 if sys.argv[4] == 'ties' else None)\n"
        "merge([Path(sys.argv[1])] * 2, sys.argv[2], Path(sys.argv[3]), recipe)\n"
        "print(1024 * (kib('VmHWM:') - before))\n"
    )
    largest = 16384 * 1024 * 4
    for combination in ("linear", "ties"):
        out = tmp_path / combination
        arguments = [sys.executable, "-c", script, str(adapter), str(base), str(out), combination]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        shutil.rmtree(out)
        assert int(done.stdout) < 2 * largest, f"{combination}: {int(done.stdout) >> 20} MiB"


def test_a_base_that_becomes_shorter_meanwhile_is_named(
    base: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = merge_stream.PartialMerge.complete

    def cut_the_rest(partial: Any, shard: str, digest: str) -> None:
        complete(partial, shard, digest)
        for path in Path(base).glob("model-*.safetensors"):
            os.truncate(path, 100)

    monkeypatch.setattr(merge_stream.PartialMerge, "complete", cut_the_rest)
    with pytest.raises(TrainingFailed, match=r"base: cannot be read any more \(model-00002.*ends after"):
        merge(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_who_interrupts_a_merge_is_told_that_it_can_go_on(
    base: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_stream.PartialMerge, "complete", interrupt)
    flags = [str(adapter), "--base-model", base, "--output-dir", str(tmp_path / "merged"), "--no-check"]
    assert run_command(main, flags) == 130
    assert "The same command goes on after the last whole file" in capsys.readouterr().err
