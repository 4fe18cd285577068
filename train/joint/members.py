"""The identities of a joint run, asked everything that may be wrong before the first step of any."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from train.batches import collate
from train.checkpoints import changed_settings
from train.config import TrainConfig
from train.data import digest_of
from train.joint.company import LaneProber
from train.joint.model import copy_over, joint_model
from train.joint.own_state import OwnState
from train.joint.passes import Batch, Passes
from train.probes import Prober
from train.run import Begun, Run, begin, check_needs, check_place, make_prober, plan_run, servable_model
from train.voice import speaker
from vllm_lora_ext.contract import IDENTITY_FILE
from vllm_lora_ext.errors import BadSetting, IdentitiesRefused, VllmLoraError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CLOSE = 2e-2  # relative, of a loss: bfloat16 has 8 bits
_TRIED_ROWS = 2


@dataclass(frozen=True)
class Member:
    """One identity, ready for its first step."""

    run: Run
    prober: Prober
    model: Any  # a PeftModel over the shared base
    state: OwnState
    begun: Begun

    @property
    def name(self) -> str:
        """What clients send as `model`."""
        return self.run.config.name


def is_finished(config: TrainConfig) -> bool:
    """Whether a joint run that is gone on with has written this one already.

    Raises:
        BadSetting: its folder was made with other settings or rows.
    """
    if not config.resume:
        return False
    try:
        text = (config.adapter_dir / IDENTITY_FILE).read_text(encoding="utf-8")
        provenance = json.loads(text)["provenance"]
        before, digest = provenance["arguments"], provenance["data"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    changed = changed_settings(before, config)
    changed += ["data"] if digest != digest_of(config.data, config.data_split) else []
    if changed:
        rule = f"was trained with other settings ({', '.join(changed)})"
        raise BadSetting(str(config.adapter_dir), rule, "Give them as they were, or another name.")
    return True


class Problems:
    """Collects what is wrong with each identity, so that all of it is told at once."""

    def __init__(self) -> None:
        self._found: list[tuple[str, VllmLoraError]] = []

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What is said and raised inside belongs to this one."""
        token = speaker.set(name)
        try:
            yield
        except VllmLoraError as error:
            self._found.append((name, error))
        finally:
            speaker.reset(token)

    def require_none(self) -> None:
        """Raises:
        IdentitiesRefused: there were some.
        """
        if self._found:
            raise IdentitiesRefused(self._found)


def plan(
    configs: Sequence[TrainConfig], tokenizer: PreTrainedTokenizerBase, shares_passes: bool
) -> list[tuple[Run, Prober]]:
    """Rows and probes of all of them.

    Raises:
        IdentitiesRefused: with everything that is wrong.
    """
    planned, problems = list[tuple[Run, Prober]](), Problems()
    with problems.of("all"):  # they publish and report to the same
        check_needs(configs[0])
    for config in configs:
        with problems.of(config.name):
            check_place(config)
            run = plan_run(config, tokenizer)
            planned.append((run, make_prober(run, LaneProber if shares_passes else None)))
    problems.require_none()
    return planned


def equip(planned: Sequence[tuple[Run, Prober]], base: PreTrainedModel) -> list[Member]:
    """A model for each over one base, in memory once, and the folders of their checkpoints.

    Raises:
        IdentitiesRefused: with everything that is wrong; no folder is left behind.
    """
    problems = Problems()
    models, begun = list[tuple[Any, OwnState]](), list[Begun]()
    for run, _ in planned:
        with problems.of(run.config.name):
            model = servable_model(run, copy_over(base))
            models.append((model, OwnState()))
    problems.require_none()
    for run, _ in planned:
        with problems.of(run.config.name):
            begun.append(begin(run.config))
    try:
        problems.require_none()
    except IdentitiesRefused:
        for one in begun:
            if one.resume_from is None:
                one.checkpoints.remove()
        raise
    return [
        Member(run, prober, model, state, one)
        for (run, prober), (model, state), one in zip(planned, models, begun, strict=True)
    ]


def shared_passes(
    members: Sequence[Member], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most_tokens: int
) -> Passes:
    """Passes for all members, once it is seen that a row's loss is what it is alone.

    Raises:
        BadSetting: rows of this base cannot share a pass, or an adapter cannot.
    """
    joint = joint_model(base, {member.name: member.model for member in members})
    passes = Passes(joint, tokenizer, most_tokens)
    tried = {member.name: collate(member.run.prepared.training[:_TRIED_ROWS], 0) for member in members}
    together = passes.answer({name: Batch(rows["input_ids"], rows["labels"]) for name, rows in tried.items()})
    for member in members:
        member.model.eval()
        rows = {name: part.to(member.model.device) for name, part in tried[member.name].items()}
        with torch.no_grad():
            alone = float(member.model(**rows)["loss"])
        member.model.train()
        if abs(float(together[member.name].loss) - alone) > _CLOSE * abs(alone):
            rule = "computes a row otherwise when it is in a pass with others"
            raise BadSetting("the base model", rule, "Use --mode exact.")
    return passes
