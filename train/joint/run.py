"""Several identities trained by one process over one base; each is finished as soon as it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.identities import JointConfig
from train.joint.company import CANCEL_FILE, LanePasses, LaneProber, LaneProgress, Turns
from train.joint.lanes import Lane, run_together
from train.joint.members import Member, Problems, equip, is_finished, plan, shared_passes
from train.joint.overview import write_overview
from train.methods import next_command, prepare_base
from train.model import load_tokenizer
from train.publish import publish
from train.run import carry_out
from train.trainer import Company
from train.voice import num_processes, say, speaker
from vllm_lora_ext.errors import BadSetting, TrainingFailed, VllmLoraError


def train_together(joint: JointConfig) -> list[str]:
    """Train all identities; gives back their folders, in order.

    Raises:
        IdentitiesRefused: with what is wrong with any of them; nothing was trained or written.
        BadInput: something is wrong for all.
        TrainingFailed: some were not finished, or not published; all others are.
    """
    if num_processes() > 1:
        raise BadSetting("--identities", "are trained by one process", "Start it without torchrun.")
    problems, left = Problems(), list[TrainConfig]()
    for config in joint.configs:
        with problems.of(config.name):
            if is_finished(config):
                say("is finished already")
            else:
                left.append(config)
    problems.require_none()
    failed = _train(left, joint) if left else {}
    write_overview(Path(joint.configs[0].output_dir), joint.configs, failed)
    if failed:
        told = "".join(f"\n  {name}: {error}" for name, error in failed.items())
        item = f"{len(failed)} of {len(joint.configs)} identities"
        raise TrainingFailed(item, f"not finished; the others are:{told}".rstrip("."))
    say(f"Next: {next_command(joint.configs[0])}")
    return [str(config.adapter_dir) for config in joint.configs]


def _train(configs: Sequence[TrainConfig], joint: JointConfig) -> dict[str, BaseException]:
    """Name -> what went wrong, for those that did not come to their end."""
    shares_passes = joint.mode == "fast"
    tokenizer = load_tokenizer(configs[0].base_path)
    planned = plan(configs, tokenizer, shares_passes)
    base = prepare_base(configs[0])
    members = equip(planned, base)
    answer = _no_answers
    if shares_passes:
        answer = shared_passes(members, base, tokenizer, joint.tokens_per_pass).answer
    checkpoints = members[0].begun.checkpoints.folder
    say(f"{len(members)} over one base; `touch {checkpoints / CANCEL_FILE}` ends {members[0].name} alone")
    gc.collect()
    gc.freeze()  # accelerate collects garbage for every run, and would look at all models each time
    with _Publisher() as publisher:
        lanes = [
            Lane(member.name, _work(member, place, members, shares_passes, publisher), member.state)
            for place, member in enumerate(members)
        ]
        try:
            run_together(lanes, answer)
        finally:
            gc.unfreeze()
    failed = {lane.name: lane.error for lane in lanes if lane.error is not None}
    for error in failed.values():
        if not isinstance(error, VllmLoraError):
            raise error  # not foreseen; the others are finished
    return {**failed, **publisher.failed}


def _no_answers(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing is computed together: a question only gave up a turn."""
    return {}


def _work(
    member: Member, place: int, members: Sequence[Member], shares_passes: bool, publisher: _Publisher
) -> Callable[[Lane], None]:
    config = member.run.config
    width = max(len(other.name) for other in members)

    def work(lane: Lane) -> None:
        speaker.set(member.name)
        passes, told = None, dict[str, Any]()
        if isinstance(member.prober, LaneProber):
            member.prober.lane = lane
        if shares_passes:
            passes = LanePasses(lane, config.lora_dropout > 0)
            told = {"joint": {"mode": "fast", "identities": len(members)}}
        turns = Turns(lane, member.begun.checkpoints, asks=not shares_passes)
        company = Company(passes, LaneProgress(member.name, place, width), [turns], told)
        folder = carry_out(member.run, member.model, member.prober, member.begun, company)
        if config.publish:
            publisher.submit(folder, config)

    return work


class _Publisher:
    """Hands finished folders over while others go on; `failed` are the names of those that were not taken."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._begun: dict[str, Future[None]] = {}
        self.failed: dict[str, BaseException] = {}

    def __enter__(self) -> _Publisher:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        for name, done in self._begun.items():
            if (problem := done.exception()) is not None:
                self.failed[name] = problem

    def submit(self, folder: str, config: TrainConfig) -> None:
        """Soon."""
        self._begun[config.name] = self._pool.submit(publish, folder, config)
