"""`python -m train`: argv -> config -> data, model, loop, export. Wires them and prints the way."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from train.arguments import parse_config
from train.config import TrainConfig, default_learning_rate, planned_steps
from train.data import Row, digest_of, read_rows, split_rows
from train.export import check_output, export_adapter
from vllm_lora_ext import __version__
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import Identity
from vllm_lora_ext.exit_codes import run_command


def say(line: str) -> None:
    """Progress goes to stderr; stdout is data."""
    print(line, file=sys.stderr, flush=True)


def train(config: TrainConfig) -> str:
    """Train one adapter and return the folder that it was written to.

    Raises:
        BadInput: rows, base model, settings or output folder are wrong; nothing was written.
        TrainingFailed: the loss became no number; nothing was written.
    """
    rows = read_rows(config.data)
    base = read_base_model(config.base_path)
    check_output(config.adapter_dir, config.overwrite)

    import transformers

    from train.model import (
        add_adapter,
        count_parameters,
        load_base,
        load_tokenizer,
        training_dtype,
    )
    from train.prompts import encode_rows, prompt_form
    from train.trainer import run_training

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading; training has its own
    tokenizer = load_tokenizer(config.base_path)
    form = prompt_form(config.prompt_template, tokenizer)
    training_rows, held_out_rows = split_rows(rows, config.validation_split, config.seed)
    training, too_long = encode_rows(training_rows, form, tokenizer, config.max_length)
    held_out, _ = encode_rows(held_out_rows, form, tokenizer, 1 << 30)
    _report_rows(training_rows, held_out_rows, too_long, config)

    transformers.set_seed(config.seed)
    base_model = load_base(config.base_path, training_dtype(config.dtype))
    rate = config.learning_rate or default_learning_rate(base_model.config.hidden_size)
    model = add_adapter(base_model, config)
    say(str(count_parameters(model)))
    say(f"{_steps_line(len(training), config)}, learning rate {rate:.2g}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with tempfile.TemporaryDirectory(prefix="vllm-lora-train-") as scratch_dir:
        result = run_training(model, training, held_out, config, rate, int(pad), scratch_dir)
    identity = Identity(
        config.name,
        form.template,
        {
            "base_model": {"name": base.public_name, "fingerprint": base.fingerprint},
            "data": {"files": [*config.data], "rows": len(rows), "sha256": digest_of(config.data)},
            "prompt_template": config.prompt_template,
            "seed": config.seed,
            "result": {key: value for key, value in vars(result).items() if key != "seconds"},
            "versions": _versions(),
        },
    )
    export_adapter(model, config.adapter_dir, identity, config.overwrite)
    held = (
        f"held out {result.eval_loss:.4f}, accuracy {result.eval_token_accuracy:.1%}"
        if result.eval_loss is not None and result.eval_token_accuracy is not None
        else "nothing held out"
    )
    say(
        f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}, "
        f"token accuracy {result.token_accuracy:.1%}; {held}"
    )
    return str(config.adapter_dir)


def _steps_line(num_rows: int, config: TrainConfig) -> str:
    steps = planned_steps(num_rows, config)
    if config.max_steps > 0:
        return f"steps = {steps} (--max-steps)"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return f"steps = {num_rows} rows x {config.num_train_epochs:g} epochs / batch of {batch} = {steps}" + (
        "" if num_rows % batch == 0 else " (the last batch of an epoch is smaller)"
    )


def _report_rows(
    training: Sequence[Row], held_out: Sequence[Row], too_long: Sequence[Row], config: TrainConfig
) -> None:
    say(f"{len(training)} rows to train on, {len(held_out)} held out")
    if too_long:
        say(
            f"warning: {len(too_long)} rows are longer than --max-length {config.max_length} and "
            f"left out: {', '.join(row.where for row in too_long[:5])}"
        )


def _versions() -> dict[str, Any]:
    packages = ("torch", "transformers", "peft")
    return {"vllm-lora": __version__} | {name: importlib.metadata.version(name) for name in packages}


def main(argv: Sequence[str]) -> int:
    """Train from command-line arguments; prints the adapter's folder on stdout."""
    print(train(parse_config(argv)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
