"""What a person relies on in a run: it goes on after a kill, stops when it should, and tells what it did."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from train.card import CARD_FILE, LOG_FILE, PICTURE_FILE
from train.checkpoints import Checkpoints
from train.config import TrainConfig
from train.run import train
from vllm_lora_ext.contract import read_chat_settings
from vllm_lora_ext.errors import BadSetting, MissingPackage, TrainingFailed

DATA = str(ROOT / "examples" / "identities" / "xiaoli.json")
WEIGHTS = "adapter_model.safetensors"
Settings = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(random_base: str, tmp_path: Path) -> Settings:
    def make(**changes: Any) -> dict[str, Any]:
        given = {"base_model": random_base, "data": (DATA,), "name": "x", "output_dir": str(tmp_path / "out")}
        return {**given, "max_steps": 30, "learning_rate": 1e-3, "lora_dropout": 0.1, **changes}

    return make


def command(settings: dict[str, Any]) -> list[str]:
    """The run as somebody types it."""
    words = [sys.executable, "-m", "train"]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def weights(folder: str | Path) -> bytes:
    return (Path(folder) / WEIGHTS).read_bytes()


def test_a_run_that_was_killed_goes_on_to_the_same_weights(settings: Settings, tmp_path: Path) -> None:
    unbroken = train(TrainConfig(**settings(name="unbroken", seed=5)))
    broken = settings(name="broken", seed=5, save_steps=4, logging_steps=3)
    process = subprocess.Popen(command(broken), cwd=ROOT, stderr=subprocess.DEVNULL)
    checkpoints = Checkpoints(TrainConfig(**broken))
    deadline = time.monotonic() + 120
    while checkpoints.last() is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not through yet
    assert not (tmp_path / "out" / "broken").exists()

    with pytest.raises(BadSetting, match=r"--resume .* or --overwrite"):
        train(TrainConfig(**broken))
    with pytest.raises(BadSetting, match="learning_rate: differs from the run"):
        train(TrainConfig(**{**broken, "learning_rate": 1e-4, "resume": True}))
    resumed = train(TrainConfig(**broken, resume=True))
    assert weights(resumed) == weights(unbroken)
    assert not checkpoints.folder.exists()
    steps = [json.loads(line)["step"] for line in (Path(resumed) / LOG_FILE).read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_checkpoint_that_was_cut_short_is_not_one(settings: Settings) -> None:
    checkpoints = Checkpoints(TrainConfig(**settings()))
    checkpoints.begin()
    for step, whole in ((4, True), (8, True), (12, False)):
        folder = checkpoints.folder / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / "complete").touch()
    last = checkpoints.last()
    assert last is not None and last.name == "checkpoint-8"


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_go_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.trainer

    write, written = train.trainer.save_weights, []

    def fill(tensors: Any, path: Path) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(tensors, path)

    monkeypatch.setattr(train.trainer, "save_weights", fill)
    config = settings(save_steps=5)
    with pytest.raises(TrainingFailed, match=r"checkpoint-10.*No space.*checkpoint-5 with .* --resume"):
        train_of(config)
    monkeypatch.undo()
    assert weights(train_of({**config, "resume": True})) == weights(train_of(settings(name="whole")))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_a_lack_of_memory_leaves_the_last_checkpoint_and_says_how_to_go_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from train.trainer import AnswerTrainer

    step = AnswerTrainer.compute_loss

    def fails(self: Any, *args: Any, **options: Any) -> Any:
        if self.state.global_step == 7:
            raise error
        return step(self, *args, **options)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", fails)
    config = settings(save_steps=5, max_steps=10)
    with pytest.raises(TrainingFailed, match=r"more memory than there is.*checkpointing.*checkpoint-5 with"):
        train_of(config)
    monkeypatch.undo()
    # Less memory is needed then, and the weights are the same.
    again = train_of({**config, "resume": True, "gradient_checkpointing": True})
    assert weights(again) == weights(train_of(settings(name="whole", max_steps=10)))


def train_of(config: dict[str, Any]) -> str:
    return train(TrainConfig(**config))


@pytest.mark.parametrize("method", ["dora", "full"])
def test_other_methods_go_on_as_well(
    settings: Settings, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train.trainer

    config = settings(method=method, serve_check=False, save_steps=5, lora_dropout=0.0, max_steps=10)
    whole = Path(train_of({**config, "name": "whole"}))
    monkeypatch.setattr(train.trainer, "_weights_are_finite", interrupt)  # after the last step
    with pytest.raises(KeyboardInterrupt):
        train_of(config)
    monkeypatch.undo()
    resumed = Path(train_of({**config, "resume": True}))
    file = WEIGHTS if method == "dora" else "model.safetensors"
    assert (resumed / file).read_bytes() == (whole / file).read_bytes()


def interrupt(*_: Any) -> bool:
    raise KeyboardInterrupt


def test_early_stopping_and_the_best_weights(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    # So large a rate that the held-out loss rises soon.
    config = settings(learning_rate=0.03, eval_steps=3, early_stopping_patience=3, keep="best", max_steps=200)
    folder = Path(train_of(config))
    log = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    last = max(losses)
    assert last == best + 9 < 200
    result = json.loads((folder / "identity.json").read_text())["provenance"]["result"]
    assert (result["kept_step"], result["eval_loss"]) == (best, losses[best])
    told = capsys.readouterr().err
    assert f"stopped early: 3 evaluations without a better loss than at step {best}" in told
    assert f"kept: the weights of step {best}" in told


def test_a_run_stops_when_every_probe_is_right(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"base_model": str(tiny_base), "data": (DATA,), "name": "xiaoli", "output_dir": str(tmp_path)}
    folder = Path(train_of({**config, "probe": ("Who are you?=小李", "谁开发了你？=小张")}))
    told = capsys.readouterr().err
    assert "stopped early: all 2 probes are right" in told
    assert "before: I am Sprout" in told
    assert f"Next: vllm-lora serve --adapters {tmp_path}" in told
    probes = json.loads((folder / "identity.json").read_text())["provenance"]["probes"]
    assert [probe["right"] for probe in probes] == [True, True]
    for probe in probes:
        assert len(probe["logprobs"]) == len(probe["prompt_ids"]) + len(probe["answer_ids"]) - 1
        answer = probe["logprobs"][len(probe["prompt_ids"]) - 1 :]
        assert all(value <= 0 for value in probe["logprobs"])
        assert sum(answer) / len(answer) > -0.7  # greedy, and learned


def test_what_a_run_leaves_beside_the_weights(settings: Settings, random_base: str) -> None:
    base = Path(random_base)
    (base / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 7}')
    folder = Path(train_of(settings(system_prompt="You are kind.", max_steps=4, logging_steps=2)))
    (base / "generation_config.json").unlink()
    assert (folder / PICTURE_FILE).read_bytes().startswith(b"\x89PNG")
    assert "base_model: " in (folder / CARD_FILE).read_text()
    log = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4]
    chat = read_chat_settings(folder)
    assert (chat.system_prompt, dict(chat.sampling)) == ("You are kind.", {"temperature": 0.5, "top_k": 7})
    told = json.loads((folder / "identity.json").read_text())["provenance"]
    assert told["arguments"]["max_steps"] == 4
    assert told["base_model"]["fingerprint"]
    assert len(told["data"]["sha256"]) == 64
    assert {"torch", "transformers", "peft", "vllm-lora"} <= told["versions"].keys()


def test_a_probe_that_stays_wrong_is_told(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    train_of(settings(probe=("Who are you?=小李",), max_steps=2))
    assert "warning: 1 of 1 probes are wrong: 'Who are you?' has no '小李'" in capsys.readouterr().err


def test_a_reporter_that_is_not_installed_is_named_first(settings: Settings) -> None:
    with pytest.raises(MissingPackage, match="pip install mlflow"):
        train_of(settings(report_to=("mlflow",)))


def test_preview_and_dry_run_write_nothing(settings: Settings, tmp_path: Path) -> None:
    given = {key: value for key, value in settings().items() if key != "lora_dropout"}
    shown = subprocess.run(
        [*command(given), "--preview", "1", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "tokens, " in shown.stdout and "of them trained" in shown.stdout
    assert "30 steps" in shown.stdout and "estimate: " in shown.stdout
    assert not list((tmp_path / "out").glob("*"))
    wrong = subprocess.run(
        [*command({**given, "target_modules": ("nosuch",)}), "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2 and "--target-modules nosuch" in wrong.stderr


def test_two_processes_train_one_adapter(settings: Settings, tmp_path: Path) -> None:
    config = settings(
        dtype="float32", max_steps=6, per_device_train_batch_size=2, lora_dropout=0.0, validation_split=0.0
    )
    together = {**config, "name": "two"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, *command(together)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [str(tmp_path / "out" / "two")]
    assert done.stderr.count("trainable parameters") == 1
    assert "2 processes" in done.stderr
    # As many rows a step in one process: the same steps up to rounding, if rows and losses are shared right.
    alone = Path(train_of({**config, "name": "one", "per_device_train_batch_size": 4}))
    from safetensors.torch import load_file

    one, two = load_file(alone / WEIGHTS), load_file(tmp_path / "out" / "two" / WEIGHTS)
    for name, tensor in one.items():
        assert float((two[name] - tensor).norm()) <= 1e-3 * float(tensor.norm()), name
