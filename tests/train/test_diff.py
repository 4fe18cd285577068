"""Two real PEFT adapters set against each other: by dense float64 arithmetic, and by a greedy loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train.diff_answers
from serve.cli import main
from tests.conftest import PROJECTIONS
from train.answers import LocalChat
from train.diff_answers import AnswerDifference, Speaker, compare_answers
from vllm_lora_ext.contract import read_chat_settings
from vllm_lora_ext.errors import AdapterRefused, BadInput, BadSetting

QUESTION, OTHER = "Who are you?", "What is one and one?"
Save = Callable[..., Path]


@pytest.fixture
def save(random_base: str, tmp_path: Path) -> Save:
    """Saves a PEFT adapter of random numbers; keywords are those of its config."""

    def make(name: str, seed: int = 0, kind: str = "LoraConfig", size: float = 0.3, **config: Any) -> Path:
        import peft
        from transformers import AutoModelForCausalLM

        alpha = {"lora_alpha": 12} if kind == "LoraConfig" else {"alpha": 12}
        settings = {"r": 4, "target_modules": list(PROJECTIONS), **alpha, **config}
        if kind == "PromptTuningConfig":
            settings = config
        base = AutoModelForCausalLM.from_pretrained(random_base)
        torch.manual_seed(seed)  # A begins at random
        model = peft.get_peft_model(base, getattr(peft, kind)(task_type="CAUSAL_LM", **settings))
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=chance))
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def speaker(folder: Path) -> Speaker:
    config = json.loads((folder / "adapter_config.json").read_text())
    return Speaker(folder, read_chat_settings(folder), config)


def ask(first: Path, second: Path, base: str, *prompts: str, **more: Any) -> list[AnswerDifference]:
    return compare_answers(speaker(first), speaker(second), prompts or (QUESTION,), base, 12, **more)


def loaded(folder: Path, base: str) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()


def prompt_ids(base: str, chat: list[dict[str, str]]) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    return list(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    )


def greedy(model: Any, ids: list[int], most: int = 12) -> tuple[list[int], list[torch.Tensor]]:
    """The most probable token again and again, without a cache; with the distribution of each place."""
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path).eos_token_id
    answer: list[int] = []
    places = []
    while len(answer) < most and (not answer or answer[-1] != end):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1].double()
        places.append(torch.log_softmax(logits, -1))
        answer.append(int(places[-1].argmax()))
    return answer, places


def deltas(folder: Path, base: str) -> dict[str, torch.Tensor]:
    """Every module's update as PEFT itself computes it, dense and in float64."""
    from peft.tuners.lora import LoraLayer

    model = loaded(folder, base).double()
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean squared cosine of the principal angles between two column spaces."""
    bases = []
    for matrix in (first, second):
        left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, singular > 1e-6 * singular[0]])
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).square().mean())


def test_modules_are_those_of_pefts_dense_updates(
    save: Save, random_base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = save("first", rank_pattern={"q_proj": 2, "down_proj": 9}, use_rslora=True)
    second = save("second", 1, r=6, alpha_pattern={"layers.1.mlp.up_proj": 3}, target_modules=PROJECTIONS[1:])
    assert main(["diff", str(first), str(second), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["weights"]
    ours, theirs = deltas(first, random_base), deltas(second, random_base)
    assert len(found["modules"]) == len(ours) == 14 and len(theirs) == 12
    squares = 0.0
    for module in found["modules"]:
        one, other = ours[module["module"]], theirs.get(module["module"])
        if other is None:
            assert module["state"] == "only in the first" and module["module"].endswith("q_proj")
            assert module["difference_norm"] == pytest.approx(float(one.norm()), rel=1e-6)
        else:
            norms = float(one.norm()), float(other.norm())
            assert module["norms"] == pytest.approx(norms, rel=1e-6)
            assert module["difference_norm"] == pytest.approx(float((one - other).norm()), rel=1e-6)
            assert module["cosine"] == pytest.approx(float((one * other).sum()) / math.prod(norms), abs=1e-6)
            assert module["inputs"]["value"] == pytest.approx(overlap(one.T, other.T), rel=1e-6)
            assert module["outputs"]["value"] == pytest.approx(overlap(one, other), rel=1e-6)
        squares += float((one - (0 if other is None else other)).square().sum())
    assert found["difference_norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_answers_part_where_two_greedy_loops_do(save: Save, random_base: str) -> None:
    first, second = save("first"), save("second", 1, r=2, target_modules=["q_proj", "up_proj"])
    found = ask(first, second, random_base, QUESTION, OTHER)
    models = loaded(first, random_base), loaded(second, random_base)
    for prompt, answer in zip((QUESTION, OTHER), found, strict=True):
        ids = prompt_ids(random_base, [{"role": "user", "content": prompt}])
        said = [greedy(model, ids) for model in models]
        place = next(
            i for i, pair in enumerate(zip(said[0][0], said[1][0], strict=False)) if len({*pair}) > 1
        )
        assert answer.parting and answer.differs and answer.asked_alike and answer.prompt == prompt
        tokens = [tokens[place] for tokens, _ in said]
        assert (answer.parting.position, list(answer.parting.tokens)) == (place, tokens)
        # Both distributions behind what both have said, which is the first one's answer up to there.
        for given, (_, places) in zip(answer.parting.logprobs, said, strict=True):
            assert given == pytest.approx([float(places[place][token]) for token in tokens], abs=1e-3)
        assert answer.parting.logprobs[0][0] >= answer.parting.logprobs[0][1]
        assert answer.parting.logprobs[1][1] >= answer.parting.logprobs[1][0]


def test_an_adapter_and_its_copy_say_the_same(save: Save, random_base: str) -> None:
    folder = save("first")
    (answer,) = ask(folder, folder, random_base)
    assert (answer.parting, answer.differs) == (None, False) and answer.first == answer.second
    assert answer.first.strip() == LocalChat(folder).ask(QUESTION, 12).adapter


def test_switched_adapters_answer_as_each_on_a_base_of_its_own(
    save: Save, random_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = save("first", use_rslora=True), save("second", 1, target_modules=["v_proj", "down_proj"])
    shared = ask(*folders, random_base, QUESTION, OTHER)
    monkeypatch.setattr(train.diff_answers, "_is_plain", lambda *_: False)
    apart = ask(*folders, random_base, QUESTION, OTHER)
    for one, other in zip(shared, apart, strict=True):
        assert (one.first, one.second) == (other.first, other.second)
        assert one.parting and other.parting and one.parting.tokens == other.parting.tokens
        for mine, theirs in zip(one.parting.logprobs, other.parting.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("kind", ["bias", "dora", "loha", "pissa", "prompt"])
def test_what_changes_the_base_does_not_reach_the_other_adapter(
    kind: str, save: Save, random_base: str
) -> None:
    odd: dict[str, dict[str, Any]] = {
        "bias": {"bias": "all"},
        "dora": {"use_dora": True},
        "loha": {"kind": "LoHaConfig"},
        "pissa": {"init_lora_weights": "pissa"},
        "prompt": {"kind": "PromptTuningConfig", "num_virtual_tokens": 3, "size": 1.0},
    }
    first, plain = save("first", 3, **odd[kind]), save("plain", 1)
    found, alone = ask(first, plain, random_base)[0], ask(plain, plain, random_base)[0]
    assert found.second == alone.second and found.parting
    ids = prompt_ids(random_base, [{"role": "user", "content": QUESTION}])
    place = found.parting.position
    said = [greedy(loaded(folder, random_base), ids) for folder in (first, plain)]
    assert list(found.parting.tokens) == [tokens[place] for tokens, _ in said]
    for given, (_, places) in zip(found.parting.logprobs, said, strict=True):
        expected = [float(places[place][token]) for token in found.parting.tokens if token is not None]
        assert given == pytest.approx(expected, abs=1e-3)


def test_each_is_asked_with_its_own_system_prompt_and_template(save: Save, random_base: str) -> None:
    first, second = save("first"), save("second")
    (second / "identity.json").write_text(json.dumps({"system_prompt": "Be kind."}))
    (answer,) = ask(first, second, random_base)
    assert not answer.asked_alike
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": QUESTION}]
    tokens, _ = greedy(loaded(second, random_base), prompt_ids(random_base, chat))
    assert answer.parting and answer.parting.tokens[1] == tokens[answer.parting.position]
    (second / "identity.json").unlink()
    (second / "chat_template.jinja").write_text("{{ messages[0].content }} =")
    assert not ask(first, second, random_base)[0].asked_alike
    (second / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(BadInput, match="template"):
        ask(first, second, random_base)


def test_an_answer_ends_at_a_stop_string(save: Save, random_base: str) -> None:
    first, second = save("first"), save("second")
    (whole,) = ask(first, second, random_base)
    assert not whole.differs
    sign = next(sign for sign in whole.first[1:-4] if sign.isascii() and sign.isprintable())
    (second / "identity.json").write_text(json.dumps({"stop": [sign]}))
    (answer,) = ask(first, second, random_base)
    assert answer.differs and answer.asked_alike
    assert answer.second == whole.first[: whole.first.index(sign)] and answer.first == whole.first
    assert answer.parting  # the first one went on behind it
    assert answer.parting.tokens[1] is None and answer.parting.texts[1] is None
    assert answer.parting.logprobs[0][1] is None and answer.parting.logprobs[0][0] is not None


def test_adapters_that_must_not_be_used_are_refused(save: Save, random_base: str, tmp_path: Path) -> None:
    folder = save("first")
    config = json.loads((folder / "adapter_config.json").read_text())
    odd = save("odd", target_modules=["q_proj"])
    (odd / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    with pytest.raises(AdapterRefused, match="rank_mismatch"):
        ask(folder, odd, random_base)
    loha = save("loha", kind="LoHaConfig")
    (loha / "chat_template.jinja").write_text("{% for a in range(10**9) %}{{ a }}{% endfor %}")
    with pytest.raises(AdapterRefused, match="template"):
        ask(folder, loha, random_base)
    with pytest.raises(BadSetting, match="the base reads"):
        ask(folder, folder, random_base, "word " * 33_000)


def test_the_command_asks_both(
    save: Save, random_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(save("first")), str(save("second", 1))]
    few = ["--max-tokens", "6"]
    assert main(["diff", *folders, "--prompt", QUESTION, "--prompt", OTHER, *few, "--exit-code"]) == 1
    text = capsys.readouterr().out
    assert f"> {QUESTION}" in text and f"> {OTHER}" in text
    assert text.count("they part at token") == 2 and text.count("log-probability, second") == 2
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{QUESTION}\n\n{OTHER}\n")
    arguments = ["--prompts", str(prompts), "--base-model", random_base, *few, "--json"]
    assert main(["diff", folders[0], folders[0], *arguments, "--exit-code"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [item["prompt"] for item in body["answers"]] == [QUESTION, OTHER] and not body["differs"]
    assert main(["diff", *folders, *arguments]) == 0
    parting = json.loads(capsys.readouterr().out)["answers"][0]["parting"]
    assert set(parting) == {"position", "before", "tokens", "texts", "logprobs"}


def test_versions_of_a_state_folder_are_asked(
    save: Save, random_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, folders = ["--state-dir", str(tmp_path / "state")], [save("first"), save("second", 1)]
    for name, folder in zip(("one", "other"), folders, strict=True):
        assert main(["publish", str(folder), "--name", name, *state, "--base-model", random_base]) == 0
    capsys.readouterr()
    flags = ["--prompt", QUESTION, "--max-tokens", "12", "--json"]
    assert main(["diff", "one", "other", *state, *flags]) == 0
    stored = json.loads(capsys.readouterr().out)["answers"]
    assert main(["diff", *map(str, folders), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == stored
