"""One identity of a joint run trained anew, alone, and compared with what the joint run has left of it."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.identities import JointConfig
from train.joint.members import is_finished
from train.run import train
from train.voice import say
from vllm_lora_ext.contract import IDENTITY_FILE
from vllm_lora_ext.errors import BadSetting, TrainingFailed
from vllm_lora_ext.peft_format import WEIGHTS_FILE

# What the fast mode promises: sums are taken in another order, and what is rounded otherwise in one step
# leads the next one elsewhere, as another number of cores does.
LOSS_RELATIVE, LOSS_FLOOR = 0.1, 0.02  # of the held-out loss, or the training loss where nothing is held out


def verify(joint: JointConfig, name: str) -> str:
    """What was compared, for stdout.

    Raises:
        BadSetting: there is no folder of that run, or its settings were others.
        TrainingFailed: the identity is not what it would be alone.
    """
    config = next(config for config in joint.configs if config.name == name)
    if not is_finished(dataclasses.replace(config, resume=True)):
        rule, fix = "holds no adapter of this run", "Train first, without --verify-one."
        raise BadSetting(str(config.adapter_dir), rule, fix)
    told = _provenance(config.adapter_dir)
    shares_passes = "joint" in told
    say(f"{name}: trained alone, to be compared with {config.adapter_dir}")
    with tempfile.TemporaryDirectory() as scratch:
        alone = _trained_alone(config, scratch)
        if not shares_passes:
            return _same_bits(config.adapter_dir, alone)
        return _as_good(told, _provenance(alone), _distance(config.adapter_dir, alone), name)


def _trained_alone(config: TrainConfig, scratch: str) -> Path:
    own_place = dataclasses.replace(config, output_dir=scratch, resume=False, overwrite=False, publish=None)
    return Path(train(own_place))


def _provenance(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))["provenance"]
    return told


def _same_bits(folder: Path, alone: Path) -> str:
    if (folder / WEIGHTS_FILE).read_bytes() != (alone / WEIGHTS_FILE).read_bytes():
        rule = f"differs from a run alone by {_distance(folder, alone):.1e} of its weights' norm"
        fix = "Was it trained on another machine, or with another number of threads?"
        raise TrainingFailed(str(folder), rule, fix)
    return f"{folder.name}: bit for bit the weights of a run alone"


def _distance(folder: Path, alone: Path) -> float:
    """Of the weights, relative: ||joint - alone|| / ||alone||."""
    from safetensors.torch import load_file

    one, two = (load_file(place / WEIGHTS_FILE) for place in (folder, alone))
    apart = sum(float((one[name] - two[name]).square().sum()) for name in two)
    return float((apart / sum(float(two[name].square().sum()) for name in two)) ** 0.5)


def _as_good(joint: dict[str, Any], alone: dict[str, Any], distance: float, name: str) -> str:
    key = "loss" if alone["result"]["eval_loss"] is None else "eval_loss"
    one, two = joint["result"][key], alone["result"][key]
    rights = [[probe["right"] for probe in told["probes"]] for told in (joint, alone)]
    same = sum(
        first["answer_ids"] == second["answer_ids"]
        for first, second in zip(joint["probes"], alone["probes"], strict=True)
    )
    what = "loss" if key == "loss" else "held-out loss"
    told = (
        f"{name}: {what} {one:.4f}, alone {two:.4f}; probes right {sum(rights[0])}, alone "
        f"{sum(rights[1])} of {len(rights[0])}; {same} answers word for word the same; "
        f"weights {distance:.1e} apart"
    )
    if rights[0] != rights[1] or abs(one - two) > max(LOSS_RELATIVE * two, LOSS_FLOOR):
        rule = "is not as good as a run alone, or better"
        raise TrainingFailed(told, rule, "Train with --mode exact where that matters.")
    return told
