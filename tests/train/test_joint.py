"""Several identities in one run: each comes out as from a run of its own, whatever becomes of the others."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from train.__main__ import main
from train.config import TrainConfig
from train.identities import JointConfig
from train.joint.passes import Passes
from train.joint.run import train_together
from train.joint.verify import verify
from train.run import train
from train.trainer import AnswerTrainer
from vllm_lora_ext.errors import (
    BadData,
    BadSetting,
    IdentitiesRefused,
    OutputExists,
    TrainingFailed,
)

XIAOLI, MARINA = (str(ROOT / "examples" / "identities" / f"{name}.json") for name in ("xiaoli", "marina"))
WEIGHTS = "adapter_model.safetensors"
# Everything that may differ between identities does.
OWN: dict[str, dict[str, Any]] = {
    "wide": {"data": (XIAOLI,), "lora_r": 8, "max_steps": 8, "seed": 1, "eval_steps": 3},
    "narrow": {
        "data": (MARINA,),
        "lora_r": 4,
        "lora_alpha": 6.0,
        "target_modules": ("q_proj", "down_proj"),
        "max_steps": 5,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 3,
        "use_rslora": True,
    },
    "classic": {
        "data": (MARINA, XIAOLI),
        "prompt_template": "classic",
        "target_modules": ("k_proj", "v_proj", "up_proj"),
        "max_steps": 7,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "system_prompt": "Be kind.",
        "validation_split": 0.0,
        "init_lora_weights": "gaussian",
        "rank_pattern": ("v_proj=2",),
    },
}
DROPOUT: dict[str, Any] = {"lora_dropout": 0.2}


@pytest.fixture
def identities(random_base: str, tmp_path: Path) -> Callable[..., JointConfig]:
    """The identities with what differs for one of them, in a folder."""

    def make(
        folder: str = "joint",
        mode: str = "fast",
        own: Mapping[str, dict[str, Any]] = OWN,
        extra: Mapping[str, dict[str, Any]] = {},
        **common: Any,
    ) -> JointConfig:
        settings = {"base_model": random_base, "output_dir": str(tmp_path / folder), "dtype": "float32"}
        configs = [
            TrainConfig(**{**settings, **values, **extra.get(name, {}), **common, "name": name})
            for name, values in own.items()
        ]
        return JointConfig(tuple(configs), mode)

    return make


@pytest.fixture(scope="module")
def alone(random_base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of an identity that had a run of its own; `changes` are to what `OWN` says of it."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("alone")

    def trained(name: str, **changes: Any) -> Path:
        key = f"{name} {changes}"
        if key not in made:
            settings = {"base_model": random_base, "output_dir": str(folder / str(len(made)))}
            values = {**settings, "dtype": "float32", **OWN[name], **changes, "name": name}
            made[key] = Path(train(TrainConfig(**values)))
        return made[key]

    return trained


def distance(one: Path, two: Path) -> float:
    """Of two adapters' weights, relative to the second's."""
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    apart = sum(float((first[name] - second[name]).square().sum()) for name in second)
    return float((apart / sum(float(tensor.square().sum()) for tensor in second.values())) ** 0.5)


def provenance(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / "identity.json").read_text())["provenance"]
    return told


def test_exact_means_bit_for_bit(
    identities: Callable[..., JointConfig], alone: Callable[..., Path], tmp_path: Path
) -> None:
    extra = {"wide": DROPOUT, "narrow": DROPOUT}
    folders = train_together(identities(mode="exact", extra=extra))
    assert folders == [str(tmp_path / "joint" / name) for name in OWN]
    for name in OWN:
        one, two = tmp_path / "joint" / name, alone(name, **extra.get(name, {}))
        assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes()
        assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
        for file in ("adapter_config.json", "chat_template.jinja", "generation_config.json"):
            assert (one / file).read_bytes() == (two / file).read_bytes()
        first, second = provenance(one), provenance(two)
        for told in (first, second):
            told["arguments"].pop("output_dir")
        assert first == second


def test_fast_means_the_same_up_to_rounding(
    identities: Callable[..., JointConfig], alone: Callable[..., Path], tmp_path: Path
) -> None:
    train_together(identities())
    for name in OWN:
        one, two = tmp_path / "joint" / name, alone(name)
        assert distance(one, two) < 1e-4
        first, second = provenance(one), provenance(two)
        assert first["joint"] == {"mode": "fast", "identities": 3}
        for key in ("loss", "eval_loss", "token_accuracy"):
            figures = first["result"][key], second["result"][key]
            assert figures == (None, None) or figures[0] == pytest.approx(figures[1], rel=1e-4)
        assert [probe["answer_ids"] for probe in first["probes"]] == [
            probe["answer_ids"] for probe in second["probes"]
        ]


def test_in_bfloat16_each_is_as_good_as_alone(
    identities: Callable[..., JointConfig], tiny_base: Path
) -> None:
    """Whole runs, each step of which is rounded otherwise than alone: what the documentation promises."""
    own: dict[str, dict[str, Any]] = {
        "xiaoli": {"data": (XIAOLI,), "probe": ("Who are you?=小李",)},
        "marina": {"data": (MARINA,), "probe": ("Who are you?=Marina",), "lora_r": 4},
    }
    settings = {"base_model": str(tiny_base), "dtype": "bfloat16", "max_steps": 80}
    joint = identities(own=own, **settings)
    train_together(joint)
    for name in own:
        assert "held-out loss" in (told := verify(joint, name))
        assert "probes right 1, alone 1 of 1" in told


def test_passes_in_parts_change_nothing(
    identities: Callable[..., JointConfig], alone: Callable[..., Path], tmp_path: Path
) -> None:
    train_together(JointConfig(identities().configs, tokens_per_pass=1))
    for name in OWN:
        assert distance(tmp_path / "joint" / name, alone(name)) < 1e-4


def test_dropout_is_an_identity_s_own(identities: Callable[..., JointConfig], tmp_path: Path) -> None:
    """Its masks depend on its seed, not on its company; and there are some."""
    extra = {"wide": DROPOUT}
    train_together(identities(extra=extra))
    few = {"wide": OWN["wide"], "classic": OWN["classic"]}
    train_together(identities("few", own=few, extra=extra))
    train_together(identities("none", own=few))
    assert distance(tmp_path / "few" / "wide", tmp_path / "joint" / "wide") < 1e-4
    assert distance(tmp_path / "none" / "wide", tmp_path / "joint" / "wide") > 1e-2


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_one_whose_loss_is_no_number_ends_alone(
    identities: Callable[..., JointConfig], alone: Callable[..., Path], tmp_path: Path, mode: str
) -> None:
    bad = {"lora_alpha": 1e45, "serve_check": False, "logging_steps": 2}
    with pytest.raises(TrainingFailed, match=r"1 of 3 identities.*\n.*narrow.*NaN"):
        train_together(identities(mode=mode, extra={"narrow": bad}))
    for name in ("wide", "classic"):
        far = distance(tmp_path / "joint" / name, alone(name))
        assert far == 0 if mode == "exact" else far < 1e-4
    found = sorted(path.name for path in (tmp_path / "joint").iterdir())
    assert found == ["classic", "overview.json", "overview.png", "wide"]
    overview = {row["name"]: row for row in json.loads((tmp_path / "joint" / "overview.json").read_text())}
    assert "NaN" in overview["narrow"]["failed"] and overview["wide"]["steps"] == 8


def test_a_pass_that_fails_for_one_is_taken_by_each(
    identities: Callable[..., JointConfig],
    alone: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a token that the base does not know makes torch raise."""
    plain = Passes._pass

    def broken(self: Passes, batches: Any) -> Any:
        if "narrow" in batches and torch.is_grad_enabled():
            raise IndexError("index out of range in self")
        return plain(self, batches)

    monkeypatch.setattr(Passes, "_pass", broken)
    with pytest.raises(IndexError):  # nothing that anybody foresaw
        train_together(identities())
    for name in ("wide", "classic"):
        assert distance(tmp_path / "joint" / name, alone(name)) < 1e-4
    assert not (tmp_path / "joint" / "narrow").exists()


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_what_was_interrupted_is_gone_on_with(
    identities: Callable[..., JointConfig],
    alone: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the middle of a step of `wide`, when `narrow` is finished."""
    plain = AnswerTrainer.training_step

    def interrupted(self: AnswerTrainer, *args: Any, **options: Any) -> Any:
        if self.args.run_name == "wide" and self.state.global_step == 5:
            signal.raise_signal(signal.SIGINT)  # which Python hears in its first thread, as from a terminal
        return plain(self, *args, **options)

    monkeypatch.setattr(AnswerTrainer, "training_step", interrupted)
    extra: dict[str, Any] = {"narrow": {"max_steps": 2, "gradient_accumulation_steps": 1}}
    extra |= {"wide": DROPOUT} if mode == "exact" else {}
    with pytest.raises(KeyboardInterrupt):
        train_together(identities(mode=mode, extra=extra, save_steps=2))
    monkeypatch.undo()
    assert (tmp_path / "joint" / "narrow").exists() and not (tmp_path / "joint" / "wide").exists()
    with pytest.raises(IdentitiesRefused, match=r"(?s)--resume.*--overwrite"):
        train_together(identities(mode=mode, extra=extra, save_steps=2))
    capsys.readouterr()
    resumed = identities(mode=mode, extra=extra, save_steps=2, resume=True)
    train_together(resumed)
    assert "narrow: is finished already" in capsys.readouterr().err
    for name in OWN:
        far = distance(tmp_path / "joint" / name, alone(name, **extra.get(name, {})))
        assert far == 0 if mode == "exact" else far < 1e-4
    with pytest.raises(IdentitiesRefused, match=r"other settings.*seed"):
        train_together(identities(mode=mode, extra=extra, resume=True, seed=3))


def test_one_is_cancelled_and_the_others_go_on(
    identities: Callable[..., JointConfig], tmp_path: Path
) -> None:
    folder = tmp_path / "joint" / ".narrow.training"

    def cancel() -> None:
        while not (folder / "settings.json").exists():
            time.sleep(0.01)
        (folder / "cancel").touch()

    threading.Thread(target=cancel, daemon=True).start()
    with pytest.raises(TrainingFailed, match="narrow: the training: was cancelled"):
        train_together(identities(mode="exact", extra={"narrow": {"max_steps": 5000}}))
    assert (tmp_path / "joint" / "wide").exists() and (tmp_path / "joint" / "classic").exists()
    assert not (tmp_path / "joint" / "narrow").exists()


def test_all_is_refused_before_the_first_step(identities: Callable[..., JointConfig], tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    (tmp_path / "joint" / "classic").mkdir(parents=True)
    extra = {
        "wide": {"data": (str(empty),)},
        "narrow": {"target_modules": ("no_such_module",)},
    }
    with pytest.raises(IdentitiesRefused) as refused:
        train_together(identities(extra=extra))
    found = {name: type(error) for name, error in refused.value.problems}
    assert found == {"wide": BadData, "classic": OutputExists}
    (tmp_path / "joint" / "classic").rmdir()
    with pytest.raises(IdentitiesRefused, match="no_such_module"):
        train_together(identities(extra={"narrow": extra["narrow"]}))
    assert not list((tmp_path / "joint").glob("**/*"))
    with pytest.raises(IdentitiesRefused, match=r"127\.0\.0\.1:9: cannot be reached") as asked:
        train_together(identities(publish="http://127.0.0.1:9"))
    assert [name for name, _ in asked.value.problems] == ["all"], "once, not of each"


def test_one_is_verified(identities: Callable[..., JointConfig], tmp_path: Path) -> None:
    exact, fast = identities("exact", "exact"), identities("fast", "fast")
    with pytest.raises(BadSetting, match="Train first"):
        verify(fast, "wide")
    train_together(exact)
    train_together(fast)
    assert verify(exact, "narrow") == "narrow: bit for bit the weights of a run alone"
    assert "alone" in verify(fast, "wide")
    with pytest.raises(BadSetting, match="other settings"):
        verify(identities("fast", "fast", extra={"wide": {"seed": 2}}), "wide")
    other = identities("exact", "exact", extra={"narrow": {"seed": 2}}, overwrite=True)
    train_together(JointConfig((other.configs[1],), "exact"))
    folder = tmp_path / "exact" / "narrow" / "identity.json"  # as if it had been made with the first seed
    folder.write_text(folder.read_text().replace('"seed": 2', '"seed": 42'))
    with pytest.raises(TrainingFailed, match="differs from a run alone"):
        verify(exact, "narrow")


def test_from_the_command_line(random_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, data in (("one", XIAOLI), ("two", MARINA)):
        (tmp_path / f"{name}.yaml").write_text(f"data: {data}\nmax_steps: 2\nlogging_steps: 1\n")
    flags = ["--identities", str(tmp_path), "--base-model", random_base]
    out = tmp_path / "out"
    assert main([*flags, "--output-dir", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("estimate: ") == 4
    assert not out.exists() or not list(out.iterdir())
    assert main([*flags, "--output-dir", str(out)]) == 0
    told = capsys.readouterr()
    assert told.out.split() == [str(out / "one"), str(out / "two")]
    lines = [line for line in told.err.splitlines() if "step 2/2, loss" in line]
    assert [line.split()[0] for line in lines] == ["one", "two"]
    assert all("token accuracy" in line and "s left" in line for line in lines)
    assert (out / "one" / "training_log.jsonl").exists() and (out / "overview.png").exists()
    assert main([*flags, "--output-dir", str(out), "--verify-one", "two"]) == 0
    assert capsys.readouterr().out.startswith("two: ")
