"""What is said of a conversion is true: every PEFT type, on a Qwen2 and on a Llama, against PEFT itself."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.train.peft_zoo import CORDA, KASA, KINDS, RANK, Kind, load, make_adapter, make_bases
from tests.train.support_table import Found, rows_of, table_in, write_table
from tests.train.test_export import files_of_at_most
from train.conversion.reduction import EXACT, Limits, TooFar
from train.convert import Conversion, convert, main
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import read_chat_settings, read_provenance, stated_digests
from vllm_lora_ext.errors import (
    AdapterRefused,
    BadInput,
    BadSetting,
    OutputExists,
    TrainingFailed,
    VllmLoraError,
)
from vllm_lora_ext.inspection import Rules, inspect_adapter, inspect_values

DOCUMENT = ROOT / "docs" / "adapter-support.md"
IDS = torch.arange(4, 36).reshape(2, 16)
BY_TITLE = {kind.title: kind for kind in KINDS}
LORA, DORA, PISSA = (BY_TITLE[title] for title in ("LoRA", "LoRA, DoRA", "LoRA, PiSSA"))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def found() -> dict[str, list[Found]]:
    """Kind -> what came of it on each base; the last test compares the document's table with it."""
    return {}


@pytest.fixture(autouse=True)
def few_threads() -> Iterator[None]:
    """More of them only wait for each other on models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits_of(base: str, adapter: Path | None) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = load(base)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, str(adapter))
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def closest(adapter: Path, output: Path, base: str) -> Conversion:
    """At rank RANK, with the smallest error that is possible there."""
    with pytest.raises(TooFar) as refused:
        convert(adapter, output, base, Limits(RANK, 1e-3))
    assert not output.exists()
    error = max(one.error for one in refused.value.results)
    assert f"{error:.1%} of its change" in str(refused.value) or len(refused.value.results) == 1
    return convert(adapter, output, base, Limits(RANK, min(error * 1.0001, 0.9999)))


def measured_errors(base: str, adapter: Path, converted: Path) -> dict[str, float]:
    """Per module, from PEFT's own merges of both: the share of the change that is not there any more."""
    weights = [_merged(base, folder) for folder in (None, adapter, converted)]
    errors = {}
    for name, original in weights[0].items():
        change, kept = (tensors[name].double() - original.double() for tensors in weights[1:])
        if float(change.norm()) > 1e-5:
            errors[name.removesuffix(".weight")] = float((kept - change).norm() / change.norm())
    return errors


def _merged(base: str, adapter: Path | None) -> dict[str, torch.Tensor]:
    model: Any = load(base)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.title)
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_each_type_is_what_it_is_said_to_be(
    kind: Kind, name: str, bases: dict[str, str], tmp_path: Path, found: dict[str, list[Found]]
) -> None:
    base, output = bases[name], tmp_path / "converted"
    adapter = make_adapter(kind, base, tmp_path / "adapter")
    claim = kind.biased if name == "qwen2" and kind.biased else kind.claim
    if claim == "refused":
        with pytest.raises(BadInput) as refused:
            convert(adapter, output, base, Limits(RANK, 0.999))
        assert refused.value.fix and not output.exists()
        found.setdefault(kind.title, []).append(Found("refused", refused.value.rule))
        return
    exact = claim == "exact"
    done = convert(adapter, output, base, Limits(RANK)) if exact else closest(adapter, output, base)
    assert done.is_exact == exact
    rank, error = max(one.rank for one in done.modules), max(one.error for one in done.modules)
    found.setdefault(kind.title, []).append(Found(claim, done.method, rank, error))
    before, after = logits_of(base, adapter), logits_of(base, output)
    effect = float((before - logits_of(base, None)).abs().max())
    if exact:
        assert float((after - before).abs().max()) <= 1e-5 + 1e-3 * effect
    else:
        told = {one.module: one.error for one in done.modules}
        assert measured_errors(base, adapter, output) == pytest.approx(told, rel=1e-2, abs=1e-6)
        assert float((after - before).abs().max()) > 1e-3 * effect
    rules = Rules(read_base_model(base))
    assert inspect_values(inspect_adapter(output, rules), rules).admitted


def test_the_document_has_what_was_found(found: dict[str, list[Found]]) -> None:
    """`WRITE_TABLES=1 python -m pytest tests/train/test_convert.py` writes it anew."""
    if set(found) != {kind.title for kind in KINDS}:
        pytest.skip("not all types were converted in this run")
    if os.environ.get("WRITE_TABLES"):
        write_table(DOCUMENT, rows_of(found))
    assert table_in(DOCUMENT) == rows_of(found)


def test_what_began_at_data_is_converted_with_the_adapter_it_began_as(
    bases: dict[str, str], tmp_path: Path
) -> None:
    """PEFT cannot load such an adapter without the data, so the trained model itself is asked."""
    base, initial = bases["llama"], tmp_path / "initial"
    adapter = make_adapter(CORDA, base, tmp_path / "adapter", initial)
    with pytest.raises(BadSetting, match="--initial-adapter"):
        convert(adapter, tmp_path / "out", base)
    done = convert(adapter, tmp_path / "out", base, initial_adapter=initial)
    assert done.is_exact and {one.rank for one in done.modules} == {16}
    before, first = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, initial))
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in (name for name in before if name.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        wanted = 1.5 * (before[other] @ before[name] - first[other] @ first[name])
        torch.testing.assert_close(after[other] @ after[name], wanted, atol=1e-5, rtol=1e-4)
    with pytest.raises(BadInput, match="other modules"):
        other_one = make_adapter(BY_TITLE["VeRA"], base, tmp_path / "other")
        convert(adapter, tmp_path / "out2", base, initial_adapter=other_one)


def test_the_formats_of_other_trainers(bases: dict[str, str], tmp_path: Path) -> None:
    """A pickle, names from torch.compile and DDP, the adapter's name in the keys, down and up."""
    base = bases["qwen2"]
    adapter = make_adapter(LORA, base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    wanted = logits_of(base, adapter)
    changes = {
        "pickle": lambda key: key,
        "default": lambda key: key.replace(".weight", ".default.weight"),
        "prefix": lambda key: "module._orig_mod." + key,
        "bare": lambda key: key.removeprefix("base_model.model."),
        "short": lambda key: key.removeprefix("base_model.model.model."),
        "down": lambda key: key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    }
    for name, change in changes.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
        renamed = {change(key): tensor for key, tensor in tensors.items()}
        if name == "pickle":
            torch.save(renamed, folder / "adapter_model.bin")
        else:
            save_file(renamed, folder / "adapter_model.safetensors")
        done = convert(folder, tmp_path / f"{name}-out", base)
        assert done.is_exact
        assert done.check.startswith("logits" if name == "pickle" else "outputs"), name
        torch.testing.assert_close(logits_of(base, tmp_path / f"{name}-out"), wanted, atol=1e-5, rtol=0)


def test_a_pickle_runs_nothing(bases: dict[str, str], tmp_path: Path) -> None:
    adapter = make_adapter(LORA, bases["qwen2"], tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    mark = tmp_path / "was-here"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (mark,)

    for content in ({"tensor": Trap()}, [1, 2], {"a": 3}):
        torch.save(content, adapter / "adapter_model.bin")
        with pytest.raises(BadInput, match="cannot be read as tensors"):
            convert(adapter, tmp_path / "out")
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x02garbage")
    with pytest.raises(BadInput, match="cannot be read as tensors"):
        convert(adapter, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.needs_base], ids=lambda kind: kind.title)
def test_what_its_own_file_says_needs_no_base(kind: Kind, bases: dict[str, str], tmp_path: Path) -> None:
    base, adapter = bases["llama"], tmp_path / "adapter"
    make_adapter(kind, base, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "nowhere/x"})
    )
    done = convert(adapter, tmp_path / "out", limits=Limits())
    assert done.is_exact and done.check.startswith("outputs of modules on random inputs")
    difference = (logits_of(base, tmp_path / "out") - logits_of(base, adapter)).abs().max()
    assert float(difference) <= 1e-5


def test_dora_keeps_its_magnitude_or_is_refused(bases: dict[str, str], tmp_path: Path) -> None:
    """PEFT's own converter drops it without a word."""
    base, output = bases["llama"], tmp_path / "out"
    adapter = make_adapter(DORA, base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "nowhere/x"})
    )
    with pytest.raises(BadSetting, match="--base-model"):
        convert(adapter, output)
    with pytest.raises(TooFar, match="vllm-lora merge"):
        convert(adapter, output, base, Limits(8, 0.01))
    done = convert(adapter, output, base, Limits(64, 0.5))
    assert not done.is_exact
    dropped = load_file(adapter / "adapter_model.safetensors")
    dropped = {name: tensor for name, tensor in dropped.items() if "magnitude" not in name}
    without = tmp_path / "without"
    without.mkdir()
    save_file(dropped, without / "adapter_model.safetensors")
    (without / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    wanted = logits_of(base, adapter)
    ours, theirs = (float((logits_of(base, one) - wanted).abs().max()) for one in (output, without))
    assert ours < theirs


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_kasa_takes_twice_its_rank_up_to_its_own_rounding(
    name: str, bases: dict[str, str], tmp_path: Path
) -> None:
    """It takes the r smallest singular values out of the base, in float32, and adds r: almost rank 2r."""
    base = bases[name]
    adapter = make_adapter(KASA, base, tmp_path / "adapter")
    done = convert(adapter, tmp_path / "out", base, Limits(16, 2e-3))
    assert max(one.rank for one in done.modules) == 16
    assert 0 < max(one.error for one in done.modules) <= 2e-3
    effect = float((logits_of(base, adapter) - logits_of(base, None)).abs().max())
    difference = logits_of(base, adapter) - logits_of(base, tmp_path / "out")
    assert float(difference.abs().max()) <= 1e-3 * effect


def test_a_lower_rank_is_the_best_there_is(bases: dict[str, str], tmp_path: Path) -> None:
    """Against the dense singular value decomposition in float64; each module has the rank that it needs."""
    base = bases["qwen2"]
    adapter = make_adapter(LORA, base, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    done = convert(adapter, tmp_path / "out", base, Limits(6, 0.45))
    for one in done.modules:
        a, b = (tensors[f"base_model.model.{one.module}.lora_{part}.weight"].double() for part in "AB")
        s = torch.linalg.svdvals(b @ a)
        assert one.error == pytest.approx(float(s[one.rank :].norm() / s.norm()), rel=1e-6)
        assert one.error <= 0.45 < float(s[one.rank - 1 :].norm() / s.norm())
    told = {one.module: one.error for one in done.modules}
    assert measured_errors(base, adapter, tmp_path / "out") == pytest.approx(told, rel=1e-2, abs=1e-6)


def test_it_is_asked_as_before_and_tells_of_its_conversion(bases: dict[str, str], tmp_path: Path) -> None:
    base = bases["qwen2"]
    adapter, output = make_adapter(PISSA, base, tmp_path / "adapter"), tmp_path / "out"
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (adapter / "generation_config.json").write_text('{"temperature": 0.5}')
    probes = [{"prompt_ids": [5, 6, 7]}]
    told = {"stop": ["Human:"], "files": {"adapter_model.safetensors": "0"}, "provenance": {"probes": probes}}
    (adapter / "identity.json").write_text(json.dumps(told))
    convert(adapter, output, base)
    chat = read_chat_settings(output)
    assert (chat.template, chat.stop, chat.sampling["temperature"]) == (
        "{{ messages[0]['content'] }}",
        ("Human:",),
        0.5,
    )
    provenance = read_provenance(output)
    assert provenance["probes"] == probes
    assert provenance["conversion"]["is_exact"] and provenance["conversion"]["check"].startswith("logits")
    assert set(stated_digests(output)) == {"adapter_config.json", "adapter_model.safetensors"}


def test_bad_input_says_what_and_leaves_nothing(bases: dict[str, str], tmp_path: Path) -> None:
    base, output = bases["qwen2"], tmp_path / "out"
    adapter = make_adapter(LORA, base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())

    def with_config(**changes: Any) -> Path:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return adapter

    for changes, words in (
        ({"peft_type": "TELEPATHY"}, "TELEPATHY, which this PEFT does not know.*LOKR"),
        ({"peft_type": "XLORA"}, "changes no weight"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "loftq"}, "LoftQ"),
        ({"init_lora_weights": "pissa_niter_4"}, "random"),
        ({"lora_alpha": "much"}, "must be a number"),
    ):
        with pytest.raises(BadInput, match=words):
            convert(with_config(**changes), output, base)
    with_config()
    with pytest.raises(AdapterRefused):  # of another size
        small = make_bases_of(tmp_path / "small", 64)
        convert(adapter, output, small)
    with pytest.raises(BadSetting, match="--max-rank 0"):
        convert(adapter, output, base, Limits(0))
    with pytest.raises(BadSetting, match="--max-error 2"):
        convert(adapter, output, base, Limits(8, 2))
    with pytest.raises(BadInput, match=r"no adapter_config\.json"):
        convert(tmp_path, output, base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    lone = {
        name: tensor for name, tensor in tensors.items() if "layers.0.self_attn.q_proj.lora_B" not in name
    }
    save_file(lone, adapter / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="q_proj: has no lora_B"):
        convert(adapter, output, base)
    save_file({name: 0 * one for name, one in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="changes nothing"):
        convert(adapter, output, base, Limits(4))
    (adapter / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(20))
    with pytest.raises(BadInput, match="cannot be read"):
        convert(adapter, output, base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(BadInput, match="neither"):
        convert(adapter, output, base)
    assert not output.exists()
    output.mkdir()
    with pytest.raises(OutputExists):
        convert(adapter, output, base)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def make_bases_of(folder: Path, width: int) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from tests.train.peft_zoo import SIZES

    Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "hidden_size": width})).save_pretrained(folder)
    return str(folder)


def test_what_cannot_be_written_leaves_nothing(bases: dict[str, str], tmp_path: Path) -> None:
    base, output = bases["qwen2"], tmp_path / "out"
    adapter = make_adapter(LORA, base, tmp_path / "adapter")
    with files_of_at_most(20_000), pytest.raises(TrainingFailed, match="nothing half-written is left"):
        convert(adapter, output, base)
    assert not output.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_conversion_that_is_wrong_is_not_written(
    bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check at the end is a real one: with a formula that is wrong nothing comes out."""
    from train.conversion import known

    right = known._scales
    monkeypatch.setattr(known, "_scales", lambda *given: {k: 1.1 * v for k, v in right(*given).items()})
    adapter = make_adapter(LORA, bases["qwen2"], tmp_path / "adapter")
    with pytest.raises(VllmLoraError, match="does not do what the first one did") as told:
        convert(adapter, tmp_path / "out", bases["qwen2"])
    assert told.value.exit_code == 1 and not (tmp_path / "out").exists()


def test_the_command(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(PISSA, bases["llama"], tmp_path / "adapter")
    assert main([str(adapter), "--output-dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert "model.layers.1.self_attn.v_proj    16" in shown.out
    assert "exact" in shown.err and "checked: logits" in shown.err
    words = [str(adapter), "--output-dir", str(tmp_path / "small"), "--max-rank", "4"]
    with pytest.raises(TooFar):
        main(words)
    assert "model.layers.1.self_attn.v_proj" in capsys.readouterr().err, "the errors are shown all the same"
    assert main([*words, "--max-error", "0.9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["is_exact"] is False and len(told["modules"]) == 6
    assert all(EXACT < one["error"] <= 0.9 for one in told["modules"])
