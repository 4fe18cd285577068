"""`python -m train`: argv -> config -> a preview, a dry run, or a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from train.arguments import parse_config
from train.config import TrainConfig
from train.run import check_before_rows, check_servable, is_first_process, make_prober, prepared_rows, train
from vllm_lora_ext.exit_codes import run_command


def show_preview(config: TrainConfig) -> None:
    """Print what would be trained on, token by token."""
    from train.preview import preview

    _, prepared, tokenizer = prepared_rows(config)
    preview([*prepared.training, *prepared.held_out], tokenizer, config.preview)


def show_dry_run(config: TrainConfig) -> None:
    """Print counts, lengths, steps, and an estimate of memory and time."""
    from train.dry_run import as_text, dry_run
    from train.methods import base_dtype

    check_before_rows(config)
    data, prepared, tokenizer = prepared_rows(config)
    make_prober(config, data, prepared, tokenizer)
    check_servable(config, prepared)
    print(as_text(dry_run(prepared, config, base_dtype(config)), config))


def main(argv: Sequence[str]) -> int:
    """Train from command-line arguments; prints the folder that was written on stdout."""
    config = parse_config(argv)
    if config.preview:
        show_preview(config)
    if config.dry_run:
        show_dry_run(config)
    if not (config.preview or config.dry_run):
        folder = train(config)
        if is_first_process():
            print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
