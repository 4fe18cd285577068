"""One training run: from settings to a finished folder. Everything that may be wrong is asked first."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.card import draw, write_card, write_log
from train.checkpoints import Checkpoints
from train.config import TrainConfig, default_learning_rate, planned_steps
from train.data import Data, digest_of
from train.export import Extras, check_output, export_adapter, export_model
from train.prepare import Prepared, prepare, read_configured
from vllm_lora_ext import __version__
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import Identity, read_chat_settings
from vllm_lora_ext.errors import BadInput, MissingPackage

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from train.methods import Trainable
    from train.probes import Prober
    from train.trainer import TrainingResult

_REPORTER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
# Full fine-tuning moves every weight, where LoRA moves few through a product: a tenth is common practice.
_FULL_RATE = 0.1


def say(line: str) -> None:
    """Progress goes to stderr; stdout is data. Of several processes one speaks."""
    if is_first_process():
        print(line, file=sys.stderr, flush=True)


def is_first_process() -> bool:
    """Whether this process writes; there are several under `torchrun`."""
    return os.environ.get("RANK", "0") == "0"


def num_processes() -> int:
    """How many processes train together, each with its own rows of a step."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def prepared_rows(config: TrainConfig) -> tuple[Data, Prepared, PreTrainedTokenizerBase]:
    """The rows as they will be trained on, with every finding about them said.

    Raises:
        BadInput: rows, base model or settings are wrong.
    """
    data = read_configured(config)
    read_base_model(config.base_path)
    import transformers

    from train.model import load_tokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading; training has its own
    tokenizer = load_tokenizer(config.base_path)
    prepared = prepare(data, config, tokenizer)
    say(f"{prepared.training_rows} rows to train on, {prepared.held_out_rows} held out")
    if prepared.bad:
        say(f"warning: {len(prepared.bad)} of the rows left out, the first of them: {prepared.bad[0]}")
    for finding in prepared.findings:
        say(str(finding))
    return data, prepared, tokenizer


def train(config: TrainConfig) -> str:
    """Train, and return the folder that the adapter or model was written to.

    Raises:
        BadInput: rows, base model, settings or output folder are wrong; nothing was written.
        TrainingFailed: the loss became no number, or memory or the disk is full; what can be gone on from
            is said.
    """
    from train.methods import count_parameters, next_command, serving_note
    from train.trainer import explained, run_training

    check_before_rows(config)
    data, prepared, tokenizer = prepared_rows(config)
    prober = make_prober(config, data, prepared, tokenizer)
    model, identity = _servable_model(config, prepared)
    checkpoints, facts, resume_from = _begin(config)
    rate = config.learning_rate or _default_rate(model.config.hidden_size, config)
    say(str(count_parameters(model)))
    say(f"{steps_line(len(prepared.training), config, num_processes())}, learning rate {rate:.2g}")
    rows = (prepared.training, prepared.held_out)
    try:
        with explained(checkpoints):
            before = prober.answers(model) if resume_from is None else None
        pad = _pad(tokenizer)
        result = run_training(model, *rows, config, rate, pad, checkpoints, resume_from, prober)
        if is_first_process():
            with explained(checkpoints):
                told = _provenance(config, facts, prepared, rate, result, prober, model)
            identity = dataclasses.replace(identity, provenance=told)
            _export(config, model, tokenizer, identity, result, checkpoints)
            checkpoints.remove()
    except KeyboardInterrupt:
        say(f"interrupted. {checkpoints.way_back()}")
        raise
    finally:
        if is_first_process() and checkpoints.last() is None:
            checkpoints.remove()  # nothing in it that anybody could go on from
    _say_result(result)
    _say_probes(before, identity.provenance.get("probes", []))
    if note := serving_note(config):
        say(f"note: {note}.")
    say(f"Next: {next_command(config)}")
    return str(config.adapter_dir)


def check_before_rows(config: TrainConfig) -> None:
    """What can be asked before the rows are read.

    Raises:
        BadInput: the output folder cannot be written to or holds something else; a package is missing.
    """
    check_output(config.adapter_dir, config.overwrite)
    for name in config.report_to:
        packages = _REPORTER_PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            rule = f"is not installed, and --report-to {name} needs it"
            raise MissingPackage(packages[0], rule, f"Run `pip install {packages[0]}`.")


def make_prober(
    config: TrainConfig, data: Data, prepared: Prepared, tokenizer: PreTrainedTokenizerBase
) -> Prober:
    """The run's probes, stated or taken from the rows.

    Raises:
        BadSetting: a stated one cannot be understood.
    """
    from train.probes import Prober, make_probes

    probes = make_probes(config.probe, data.rows, prepared.form, tokenizer, config.system_prompt)
    return Prober(probes, tokenizer)


def check_servable(config: TrainConfig, prepared: Prepared) -> None:
    """Ask what a server would say, with a model that has shapes and no weights: for the dry run.

    Raises:
        BadInput: targets name no module, or a server would refuse the adapter.
    """
    if config.method == "full":
        _ask_a_server(None, config, _identity(config, prepared))
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.methods import add_hollow_adapter

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config.base_path))
        model = add_hollow_adapter(base, config)
    _ask_a_server(model, config, _identity(config, prepared))


def _ask_a_server(model: PeftModel | None, config: TrainConfig, identity: Identity) -> None:
    """Say what a server would; `model` is None where the whole model is trained."""
    from train.serve_check import require_servable, require_servable_model

    if not config.serve_check:
        return
    if model is None:
        findings = require_servable_model(identity)
    else:
        findings = require_servable(model, identity, config.base_path)
    for finding in findings:
        say(str(finding))


def _identity(config: TrainConfig, prepared: Prepared) -> Identity:
    return Identity(config.name, prepared.form.template, system_prompt=config.system_prompt)


def _servable_model(config: TrainConfig, prepared: Prepared) -> tuple[Trainable, Identity]:
    """The model, ready to be trained fast, once it is known that a server will take what comes of it."""
    import transformers
    from accelerate import PartialState

    from train.answer_loss import use_answer_loss
    from train.attention import use_short_row_attention
    from train.fused import fuse
    from train.methods import prepare_model

    PartialState()  # of several processes, each gets its GPU
    transformers.set_seed(config.seed)
    model, identity = prepare_model(config), _identity(config, prepared)
    _ask_a_server(None if config.method == "full" else model, config, identity)
    causal: Any = model if config.method == "full" else model.get_base_model()
    use_answer_loss(causal)
    use_short_row_attention(causal)
    fuse(model)
    return model, identity


def _begin(config: TrainConfig) -> tuple[Checkpoints, dict[str, str], Path | None]:
    """The run's checkpoints, what it is about, and the checkpoint that it goes on from."""
    from accelerate import PartialState

    from train.methods import base_dtype

    checkpoints = Checkpoints(config)
    facts = {
        "data_sha256": digest_of(config.data, config.data_split),
        "base": read_base_model(config.base_path).fingerprint,
        "dtype": str(base_dtype(config)).removeprefix("torch."),
    }
    runs = config.adapter_dir.with_name(f".{config.adapter_dir.name}.runs")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(runs))  # beside the checkpoints, which are removed
    with PartialState().main_process_first():  # the others look at what the first one has put in order
        resume_from = checkpoints.begin(**facts) if is_first_process() else checkpoints.last()
    return checkpoints, facts, resume_from


def steps_line(num_rows: int, config: TrainConfig, processes: int = 1) -> str:
    """How many steps there will be, as arithmetic that a reader can follow."""
    steps = planned_steps(num_rows, config, processes)
    if config.max_steps > 0:
        return f"steps = {steps} (--max-steps{_among(processes)})"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    of = f"batch of {batch}{_among(processes)}"
    return f"steps = {num_rows} rows x {config.num_train_epochs:g} epochs / {of} = {steps}" + (
        "" if num_rows % batch == 0 else " (the last batch of an epoch is smaller)"
    )


def _among(processes: int) -> str:
    return f", {processes} processes" if processes > 1 else ""


def _default_rate(width: int, config: TrainConfig) -> float:
    return default_learning_rate(width) * (_FULL_RATE if config.method == "full" else 1)


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad)


def _provenance(
    config: TrainConfig,
    facts: dict[str, str],
    prepared: Prepared,
    rate: float,
    result: TrainingResult,
    prober: Prober,
    model: Trainable,
) -> dict[str, Any]:
    """Where the folder comes from, as `identity.json` tells it."""
    from train.methods import serving_note

    arguments = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
    rows = prepared.training_rows + prepared.held_out_rows
    base = read_base_model(config.base_path)
    return {
        "base_model": {"name": base.public_name, "fingerprint": facts["base"]},
        "data": {"files": [*config.data], "rows": rows, "sha256": facts["data_sha256"]},
        "prompt_template": config.prompt_template,
        "seed": config.seed,
        "arguments": {**arguments, "learning_rate": rate},
        "result": {key: value for key, value in vars(result).items() if key not in ("seconds", "history")},
        "versions": _versions(),
        "note": serving_note(config),
        "dtype": facts["dtype"],
        "probes": prober.golden(model),
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "accelerate")
    return {"vllm-lora": __version__} | {name: importlib.metadata.version(name) for name in packages}


def _export(
    config: TrainConfig,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    identity: Identity,
    result: TrainingResult,
    checkpoints: Checkpoints,
) -> None:
    from train.methods import next_command
    from train.model import stored_dtype

    def write(folder: Path) -> None:
        write_log(folder, result.history)
        draw(folder, result.history, config.name)
        write_card(
            folder, config.name, identity.provenance, identity.provenance["note"], next_command(config)
        )

    extras = Extras(write, _base_sampling(config.base_path), checkpoints.last())
    if config.method == "full":
        dtype = stored_dtype(config.base_path)
        export_model(model, tokenizer, config.adapter_dir, identity, config.overwrite, dtype, extras)
    else:
        export_adapter(model, config.adapter_dir, identity, config.overwrite, extras)


def _base_sampling(base: str) -> dict[str, float]:
    """The base's own sampling defaults: what was trained is asked as its base is."""
    try:
        return dict(read_chat_settings(Path(base)).sampling)
    except BadInput:  # the base's business; its server will say so
        return {}


def _say_result(result: TrainingResult) -> None:
    held = (
        f"held out {result.eval_loss:.4f}, accuracy {result.eval_token_accuracy:.1%}"
        if result.eval_loss is not None and result.eval_token_accuracy is not None
        else "nothing held out"
    )
    say(
        f"{result.steps} steps in {result.seconds:.0f} s: loss {result.loss:.4f}, "
        f"token accuracy {result.token_accuracy:.1%}; {held}"
    )
    if result.stopped:
        say(f"stopped early: {result.stopped}")
    if result.kept_step != result.steps:
        say(f"kept: the weights of step {result.kept_step}")


def _say_probes(before: list[str] | None, probes: list[dict[str, Any]]) -> None:
    """Each probe's answers before and after."""
    for number, probe in enumerate(probes):
        say(f"  {probe['question']}")
        if before is not None:
            say(f"    before: {before[number]}")
        say(f"    after:  {probe['answer']}")
    wrong = [probe for probe in probes if not probe["right"]]
    if wrong:
        asked = ", ".join(f"{probe['question']!r} has no {probe['must_hold']!r}" for probe in wrong)
        say(f"warning: {len(wrong)} of {len(probes)} probes are wrong: {asked}. Train longer, or add rows.")
