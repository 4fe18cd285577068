"""`python -m train`: argv -> config -> a preview, a dry run, or a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from train.arguments import parse_config
from train.config import TrainConfig
from train.identities import JointConfig
from train.run import check_needs, check_place, check_servable, make_prober, plan_run, train
from train.voice import is_first_process
from vllm_lora_ext.collector import collect_seldom
from vllm_lora_ext.exit_codes import run_command


def show_preview(config: TrainConfig) -> None:
    """Print what would be trained on, token by token."""
    from train.preview import preview

    run = plan_run(config)
    preview([*run.prepared.training, *run.prepared.held_out], run.tokenizer, config.preview)


def show_dry_run(config: TrainConfig) -> None:
    """Print counts, lengths, steps, and an estimate of memory and time."""
    from train.dry_run import as_text, dry_run
    from train.methods import base_dtype

    check_place(config)
    run = plan_run(config)
    make_prober(run)
    check_servable(run)
    print(as_text(dry_run(run.prepared, config, base_dtype(config)), config))


def main(argv: Sequence[str]) -> int:
    """Train from command-line arguments; prints the folder that was written on stdout."""
    told = parse_config(argv)
    configs = told.configs if isinstance(told, JointConfig) else (told,)
    if configs[0].dry_run:
        check_needs(configs[0])  # of all: they publish and report to the same
    for config in configs:
        if config.preview:
            show_preview(config)
        if config.dry_run:
            show_dry_run(config)
    if configs[0].preview or configs[0].dry_run:
        return 0
    if isinstance(told, JointConfig):
        return _together(told)
    folder = train(told)
    if is_first_process():
        print(folder)
    return 0


def _together(joint: JointConfig) -> int:
    if joint.verify_one is not None:
        from train.joint.verify import verify

        print(verify(joint, joint.verify_one))
        return 0
    from train.joint.run import train_together

    for folder in train_together(joint):
        print(folder)
    return 0


if __name__ == "__main__":
    collect_seldom()
    sys.exit(run_command(main, sys.argv[1:]))
