"""What admission says of adapters: each broken rule by its code, all of them at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import BASE_CONFIG, PROJECTIONS, lora_tensors
from vllm_lora_ext.base_model import BaseModel
from vllm_lora_ext.errors import AdapterRefused
from vllm_lora_ext.inspection import Inspection, Rules, inspect_adapter, require_admitted
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.peft_format import adapter_folders, canonical_config
from vllm_lora_ext.spec import EngineLimits, allowed_rank
from vllm_lora_ext.strict_json import canonical

BASE = BaseModel("base", BASE_CONFIG)
RULES = Rules(BASE)
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
MakeAdapter = Callable[..., Path]


def codes(inspection: Inspection) -> set[str]:
    return {finding.code for finding in inspection.findings}


def test_a_fitting_adapter_is_admitted_without_a_word(make_adapter: MakeAdapter) -> None:
    inspection = inspect_adapter(make_adapter(), RULES)
    assert inspection.state == "admitted"
    assert inspection.findings == ()
    assert require_admitted(inspection).max_rank == 8


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "IA3"}, "peft_type_unsupported"),
        ({"peft_type": None}, "peft_type_unsupported"),
        ({"r": 0}, "rank_invalid"),
        ({"r": True}, "rank_invalid"),
        ({"r": 8.5}, "rank_invalid"),
        ({"r": "8"}, "rank_invalid"),
        ({"lora_alpha": None}, "alpha_invalid"),
        ({"lora_alpha": -1}, "alpha_invalid"),
        ({"lora_alpha": float("nan")}, "config_not_finite"),
        ({"use_dora": True}, "feature_unsupported"),
        ({"bias": "all"}, "feature_unsupported"),
        ({"modules_to_save": ["lm_head"]}, "feature_unsupported"),
        ({"init_lora_weights": "pissa"}, "init_unsupported"),
        ({"use_qalora": True}, "feature_unsupported"),
        ({"use_bdlora": {"a": 1}}, "feature_unsupported"),
        ({"target_modules": None}, "target_modules_invalid"),
        ({"lora_alpha": 10**400}, "alpha_invalid"),
        ({"lora_alpha": {}}, "alpha_invalid"),
        ({"r": []}, "rank_invalid"),
        ({"rank_pattern": []}, "pattern_unsupported"),
        ({"rank_pattern": {"(a|a)*b": 8}}, "pattern_unsupported"),
        ({"alpha_pattern": {"(": 8}}, "pattern_unsupported"),
        ({"rank_pattern": {"q_proj": [True]}}, "rank_invalid"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_invalid"),
        ({"r": 4}, "rank_mismatch"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    make_adapter: MakeAdapter, config: dict[str, Any], code: str
) -> None:
    inspection = inspect_adapter(make_adapter(**config), RULES)
    assert code in codes(inspection)
    assert not inspection.admitted


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "mica", "lora_ga"])
def test_initialisations_that_leave_the_base_alone_are_served(make_adapter: MakeAdapter, init: Any) -> None:
    assert inspect_adapter(make_adapter(init_lora_weights=init), RULES).state == "admitted"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({f"{STEM}.lora_A.weight": np.zeros((8, 32), np.float32)}, "shape_mismatch"),
        ({f"{STEM}.lora_A.weight": np.zeros((8, 128), np.float32)}, "shape_mismatch"),
        ({f"{STEM}.lora_B.weight": np.zeros((8, 1), np.float32)}, "shape_mismatch"),
        ({f"{STEM}.lora_A.weight": np.zeros((8,), np.float32)}, "shape_mismatch"),
        ({f"{STEM}.lora_B.weight": None}, "pair_incomplete"),
        ({"base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}, "vocab_unsupported"),
        ({"base_model.model.score.weight": np.zeros((2, 2), np.float32)}, "module_unknown"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    make_adapter: MakeAdapter, change: dict[str, Any], code: str
) -> None:
    tensors = {name: value for name, value in (lora_tensors() | change).items() if value is not None}
    inspection = inspect_adapter(make_adapter(tensors=tensors), RULES)
    assert code in codes(inspection)
    assert not inspection.admitted


def test_an_adapter_that_matches_nothing_is_refused_and_says_where_it_was_trained(
    make_adapter: MakeAdapter,
) -> None:
    renamed = {name.replace("model.layers", "h"): value for name, value in lora_tensors().items()}
    folder = make_adapter(tensors=renamed, base_model_name_or_path="other/model")
    finding, note = inspect_adapter(folder, RULES).findings
    assert (finding.code, note.code) == ("module_unknown", "base_unread")
    assert "0 of 28 tensors match" in finding.rule
    assert "other/model" in finding.fix


def test_one_finding_tells_how_many_modules_break_the_same_rule(make_adapter: MakeAdapter) -> None:
    smaller = BaseModel("smaller", {**BASE_CONFIG, "hidden_size": 32, "intermediate_size": 48})
    findings = inspect_adapter(make_adapter(), Rules(smaller)).findings
    assert [finding.code for finding in findings] == ["shape_mismatch", "base_mismatch"]
    assert "(and 27 more)" in findings[0].rule


def test_layers_beyond_the_base_are_refused(make_adapter: MakeAdapter) -> None:
    inspection = inspect_adapter(make_adapter(tensors=lora_tensors(layers=3)), RULES)
    assert codes(inspection) == {"module_unknown"}


def test_fewer_layers_than_the_base_are_fine_and_noted(make_adapter: MakeAdapter) -> None:
    inspection = inspect_adapter(make_adapter(tensors=lora_tensors(layers=1)), RULES)
    assert (inspection.state, codes(inspection)) == ("admitted", {"layers_fewer"})


@pytest.mark.parametrize("pattern", [{"q_proj": 16}, {"self_attn.q_proj|nothing": 16}])
def test_a_rank_pattern_is_the_rank_of_its_modules(
    make_adapter: MakeAdapter, pattern: dict[str, int]
) -> None:
    tensors = lora_tensors()
    for layer in range(2):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_A.weight"] = np.zeros((16, 64), np.float32)
        tensors[f"{stem}.lora_B.weight"] = np.zeros((64, 16), np.float32)
    inspection = inspect_adapter(make_adapter(tensors=tensors, rank_pattern=pattern), RULES)
    assert inspection.state == "admitted"
    assert require_admitted(inspection).max_rank == 16


def test_a_rank_above_the_engines_says_which_flag_to_raise(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(tensors=lora_tensors(rank=40), r=40)
    (finding,) = inspect_adapter(folder, Rules(BASE, limits=EngineLimits(32))).findings
    assert finding.code == "rank_too_large"
    assert "--max-lora-rank 64" in finding.fix


def test_an_unknown_architecture_is_left_to_the_engine(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(base_model_name_or_path="org/odd")
    inspection = inspect_adapter(folder, Rules(BaseModel("odd", {"model_type": "mamba"})))
    assert inspection.state == "unproven"
    assert inspection.admitted


def test_a_broken_folder_tells_everything_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": ')
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    inspection = inspect_adapter(folder, RULES)
    assert codes(inspection) == {"config_not_json", "pickle_refused"}
    with pytest.raises(AdapterRefused, match=r"config_not_json.*pickle_refused"):
        require_admitted(inspection)


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (None, "config_missing"),
        (b"", "config_not_json"),
        (b"\xff\xfe", "config_not_json"),
        (b"[" * 100_000, "config_not_json"),
        (b"[]", "config_not_object"),
        (b" " * (1 << 20) + b"{} ", "config_too_large"),
    ],
)
def test_a_config_that_is_none_is_named(make_adapter: MakeAdapter, config: bytes | None, code: str) -> None:
    folder = make_adapter()
    (folder / "adapter_config.json").unlink()
    if config is not None:
        (folder / "adapter_config.json").write_bytes(config)
    assert code in codes(inspect_adapter(folder, RULES))


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64, (1 << 60).to_bytes(8, "little")])
def test_weights_that_are_no_safetensors_file_are_refused(make_adapter: MakeAdapter, content: bytes) -> None:
    folder = make_adapter()
    (folder / "adapter_model.safetensors").write_bytes(content)
    assert codes(inspect_adapter(folder, RULES)) == {"weights_corrupt"}


def test_weights_cut_short_are_refused(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert codes(inspect_adapter(folder, RULES)) == {"weights_corrupt"}


def test_missing_weights_and_missing_folders_are_named(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = make_adapter()
    (folder / "adapter_model.safetensors").unlink()
    assert codes(inspect_adapter(folder, RULES)) == {"weights_missing"}
    assert codes(inspect_adapter(tmp_path / "nowhere", RULES)) == {"adapter_missing"}


def test_an_adapter_without_tensors_is_refused(make_adapter: MakeAdapter) -> None:
    assert "adapter_empty" in codes(inspect_adapter(make_adapter(tensors={}), RULES))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/etc", "a\\b", "a\n", "a\0", "x" * 65, "%2e%2e", " a"]
)
def test_names_that_could_mean_something_else_are_refused(name: str) -> None:
    assert [finding.code for finding in judge_name(name)] == ["adapter_name_invalid"]


@pytest.mark.parametrize(
    "name",
    [
        "text",
        "image",
        "audio",
        "video",
        "input",
        "warmup_1",
        "warmup_27",
        "Warmup_2",
        "base",
        "Text",
        "BASE",
        "a@b",
        "a/rollback",
        "a/b/Traffic",
    ],
)
def test_reserved_names_are_refused(name: str) -> None:
    assert [finding.code for finding in judge_name(name, ["base"])] == ["adapter_name_reserved"]


@pytest.mark.parametrize("sign", ["\u200c", "\u200d", "\u00ad", "\ufe0f"])
def test_a_name_with_what_nobody_sees_is_told_so(sign: str) -> None:
    (finding,) = judge_name(f"a{sign}b")
    assert finding.code == "adapter_name_invalid"
    assert f"U+{ord(sign):04X}" in finding.rule and finding.item.isprintable()


@pytest.mark.parametrize("name", ["xiaoli", "小李", "v1.2", "a-b_c", "org/name", "हिन्दी", "_x"])
def test_ordinary_names_are_fine(name: str) -> None:
    assert judge_name(name, ["base"]) == []


def test_a_rank_is_rounded_up_to_one_that_vllm_allocates() -> None:
    assert [allowed_rank(rank) for rank in (1, 2, 16, 33, 300, 512, 513)] == [1, 8, 16, 64, 320, 512, None]


def test_broken_chat_settings_refuse_the_adapter(make_adapter: MakeAdapter) -> None:
    folder = make_adapter()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "identity.json").write_text("{")
    assert codes(inspect_adapter(folder, RULES)) == {"chat_settings_invalid"}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "chat_template.jinja", "adapter_config.json"])
def test_a_pipe_in_place_of_a_file_is_refused_and_does_not_hang(make_adapter: MakeAdapter, file: str) -> None:
    folder = make_adapter()
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    assert not inspect_adapter(folder, RULES).admitted


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_lora_on_the_vocabulary_is_left_to_the_engine(make_adapter: MakeAdapter, module: str) -> None:
    shapes = (
        {"lora_embedding_A": (8, 512), "lora_embedding_B": (64, 8)}
        if "embed" in module
        else {"lora_A.weight": (8, 64), "lora_B.weight": (512, 8)}
    )
    extra = {
        f"base_model.model.{module}.{side}": np.zeros(shape, np.float32) for side, shape in shapes.items()
    }
    targets = [*PROJECTIONS, module.rpartition(".")[2]]
    inspection = inspect_adapter(make_adapter(tensors=lora_tensors() | extra, target_modules=targets), RULES)
    assert (inspection.state, codes(inspection)) == ("unproven", {"module_unproven"})


HEAD = "base_model.model.score"
CLASSIFIER = BaseModel("base", {**BASE_CONFIG, "architectures": ["Qwen2ForSequenceClassification"]})
UNNAMED = BaseModel("base", {name: value for name, value in BASE_CONFIG.items() if name != "architectures"})


def stored(*names: str, shape: tuple[int, ...] = (2, 64)) -> dict[str, np.ndarray]:
    return {name: np.ones(shape[:1] if name.endswith("bias") else shape, np.float32) for name in names}


@pytest.mark.parametrize(
    ("base", "tensors", "expected"),
    [
        (CLASSIFIER, stored(f"{HEAD}.weight"), {"head_unproven"}),
        (CLASSIFIER, stored(f"{HEAD}.weight", f"{HEAD}.bias"), {"head_unproven"}),
        (UNNAMED, stored(f"{HEAD}.weight"), {"head_unproven"}),
        (BASE, stored(f"{HEAD}.weight"), {"feature_unsupported"}),
        (CLASSIFIER, stored(f"{HEAD}.bias"), {"pair_incomplete"}),
        (CLASSIFIER, stored(f"{HEAD}.dense.weight"), {"module_unknown", "head_unproven"}),
        (CLASSIFIER, stored(f"{HEAD}.weight", shape=(2, 8, 8)), {"module_unknown", "head_unproven"}),
        (
            CLASSIFIER,
            stored(f"{HEAD}.weight", "base_model.model.classifier.weight"),
            {"module_unknown", "head_unproven"},
        ),
        (CLASSIFIER, {}, {"head_unproven"}),
    ],
)
def test_a_head_is_one_weight_of_a_classifier(
    make_adapter: MakeAdapter, base: BaseModel, tensors: dict[str, Any], expected: set[str]
) -> None:
    folder = make_adapter(tensors=lora_tensors() | tensors, modules_to_save=["score"], task_type="SEQ_CLS")
    inspection = inspect_adapter(folder, Rules(base))
    assert codes(inspection) == expected
    assert inspection.state == ("unproven" if expected == {"head_unproven"} else "refused")


def test_a_head_alone_is_an_adapter(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(tensors=stored(f"{HEAD}.weight"), modules_to_save=["score", "classifier"])
    assert inspect_adapter(folder, Rules(CLASSIFIER)).state == "unproven"


@pytest.mark.parametrize(
    "tensors",
    [
        stored("base_model.model.model.embed_tokens.base_layer.weight", shape=(512, 64)),
        stored(f"{STEM}.lora_A.weight", shape=(8, 64)),
        stored("other.weight"),
    ],
    ids=["a copy of the base's", "half a pair", "something else"],
)
def test_what_holds_no_pair_is_empty_whatever_is_allowed(
    make_adapter: MakeAdapter, tensors: dict[str, Any]
) -> None:
    allowed = frozenset({"adapter_empty", "module_unknown", "pair_incomplete", "target_modules_mismatch"})
    inspection = inspect_adapter(make_adapter(tensors=tensors), Rules(BASE, allow=allowed))
    assert "adapter_empty" in codes(inspection) and not inspection.admitted


@pytest.mark.parametrize(
    ("module", "sides"),
    [
        ("model.layers.0.self_attn.q_proj", {"lora_embedding_A": (8, 64), "lora_embedding_B": (64, 8)}),
        ("model.embed_tokens", {"lora_A.weight": (8, 512), "lora_B.weight": (64, 8)}),
    ],
)
def test_matrices_of_embeddings_belong_to_embeddings(
    make_adapter: MakeAdapter, module: str, sides: dict[str, tuple[int, int]]
) -> None:
    stem = f"base_model.model.{module}."
    tensors = {name: value for name, value in lora_tensors().items() if not name.startswith(stem)}
    tensors |= {stem + side: np.zeros(shape, np.float32) for side, shape in sides.items()}
    folder = make_adapter(tensors=tensors, target_modules=[*PROJECTIONS, "embed_tokens"])
    findings = inspect_adapter(folder, RULES).findings
    assert any(f.code == "module_unknown" and "embedding" in f.rule for f in findings)


def test_an_alpha_of_zero_can_be_allowed(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(lora_alpha=0, alpha_pattern={"q_proj": 0})
    assert not inspect_adapter(folder, RULES).admitted
    assert inspect_adapter(folder, Rules(BASE, allow=frozenset({"alpha_no_effect"}))).admitted


def test_whole_numbers_have_one_form(make_adapter: MakeAdapter) -> None:
    changes: list[dict[str, Any]] = [
        {"lora_alpha": 16, "alpha_pattern": {"q_proj": 8}},
        {"lora_alpha": 16.0, "alpha_pattern": {"q_proj": 8.0}},
    ]
    specs = [
        require_admitted(inspect_adapter(make_adapter(f"a{i}", **change), RULES))
        for i, change in enumerate(changes)
    ]
    one, other = (canonical(canonical_config(spec)) for spec in specs)
    assert one == other and b"16.0" not in one


def test_a_name_of_half_characters_does_not_stop_anything(make_adapter: MakeAdapter) -> None:
    folder = make_adapter(target_parameters=["\ud800"])
    assert codes(inspect_adapter(folder, RULES)) == {"config_not_json"}


def test_folders_that_may_not_be_looked_into_are_adapters_that_are_refused(make_adapter: MakeAdapter) -> None:
    from tests.unit.vllm_lora_ext.test_bad_adapters import another_user

    fine = make_adapter("fine")
    closed, listed = fine.parent / "closed", fine.parent / "listed"
    (fine.parent / os.fsdecode(b"no\xfftext")).mkdir()
    closed.mkdir(mode=0)
    (listed / "inner").mkdir(parents=True)
    listed.chmod(0o444)
    outer = [path for path in fine.parents if path.is_relative_to(fine.parents[3])]
    with another_user(*outer):
        found = adapter_folders(fine.parent)
        states = {name: codes(inspect_adapter(path, RULES)) for name, path in found.items()}
        with pytest.raises(PermissionError):
            adapter_folders(closed)
    closed.chmod(0o755)
    listed.chmod(0o755)
    assert set(found) == {"fine", "closed", "listed", "no\\xfftext"}
    assert states["closed"] == {"permission_denied"}
    assert states["listed"] == {"permission_denied"}
    assert judge_name("no\\xfftext")


def test_a_finding_is_written_with_code_item_rule_and_fix(make_adapter: MakeAdapter) -> None:
    (finding,) = inspect_adapter(make_adapter(peft_type="IA3"), RULES).findings
    assert str(finding) == (
        "[peft_type_unsupported] peft_type: is 'IA3'; vLLM serves LORA only. "
        "Train a LoRA, or merge the adapter into its base."
    )
