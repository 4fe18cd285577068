"""One training run: from settings to a finished folder. Everything that may be wrong is asked first."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from train.card import draw, write_card, write_log
from train.checkpoints import Checkpoints
from train.config import TrainConfig, default_learning_rate, planned_steps
from train.data import Data, digest_of
from train.export import Extras, check_output, export_adapter, export_model
from train.prepare import Prepared, prepare, read_configured
from train.publish import check_server, publish
from train.voice import is_first_process, num_processes, say, say_probes, say_result
from vllm_lora_ext import __version__
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.contract import Identity, read_chat_settings
from vllm_lora_ext.errors import BadInput, MissingPackage

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from train.methods import Trainable
    from train.probes import Prober
    from train.trainer import Company, TrainingResult

_REPORTER_PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
# Full fine-tuning moves every weight, where LoRA moves few through a product: a tenth is common practice.
_FULL_RATE = 0.1
_STATED_RUNS = os.environ.get("TENSORBOARD_LOGGING_DIR")


@dataclass(frozen=True)
class Run:
    """A run of which everything is asked that can be asked without the base's weights."""

    config: TrainConfig
    data: Data
    prepared: Prepared
    tokenizer: PreTrainedTokenizerBase

    @property
    def identity(self) -> Identity:
        """What will stand in `identity.json`, but for where it comes from."""
        return Identity(
            self.config.name, self.prepared.form.template, system_prompt=self.config.system_prompt
        )


def plan_run(config: TrainConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Run:
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
    tokenizer = load_tokenizer(config.base_path) if tokenizer is None else tokenizer
    prepared = prepare(data, config, tokenizer)
    say(f"{prepared.training_rows} rows to train on, {prepared.held_out_rows} held out")
    if prepared.bad:
        say(f"warning: {len(prepared.bad)} of the rows left out, the first of them: {prepared.bad[0]}")
    for finding in prepared.findings:
        say(str(finding))
    return Run(config, data, prepared, tokenizer)


def train(config: TrainConfig) -> str:
    """Train, and return the folder that the adapter or model was written to.

    Raises:
        BadInput: rows, base model, settings or output folder are wrong; nothing was written.
        TrainingFailed: the loss became no number, or memory or the disk is full; what can be gone on from
            is said.
    """
    from train.methods import next_command

    check_place(config)
    check_needs(config)
    run = plan_run(config)
    prober = make_prober(run)
    model = servable_model(run)
    folder = carry_out(run, model, prober, begin(config))
    if is_first_process() and config.publish:
        publish(folder, config)
    say(f"Next: {next_command(config)}")
    if num_processes() > 1:
        _part()
    return folder


def _part() -> None:
    """End together: a process that ends with its connections open, while another writes, may abort."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()


def carry_out(
    run: Run, model: Trainable, prober: Prober, begun: Begun, company: Company | None = None
) -> str:
    """Everything from the first step to the finished folder, which is given back.

    Raises:
        BadInput: the output folder holds something else by now.
        TrainingFailed: as `train`.
    """
    from train.methods import count_parameters, serving_note
    from train.trainer import ALONE, explained, run_training

    company = company or ALONE
    config, prepared, identity = run.config, run.prepared, run.identity
    checkpoints, facts, resume_from = begun
    rate = config.learning_rate or _default_rate(model.config.hidden_size, config)
    say(str(count_parameters(model)))
    say(f"{steps_line(len(prepared.training), config, num_processes())}, learning rate {rate:.2g}")
    rows = (prepared.training, prepared.held_out)
    try:
        with explained(checkpoints):
            before = prober.answers(model) if resume_from is None else None
        pad = _pad(run.tokenizer)
        _log_beside(config)
        result = run_training(model, *rows, config, rate, pad, checkpoints, resume_from, prober, company)
        if is_first_process():
            with explained(checkpoints):
                told = _provenance(config, facts, prepared, rate, result, prober, model)
            identity = dataclasses.replace(identity, provenance={**told, **company.provenance})
            _export(config, model, run.tokenizer, identity, result, checkpoints)
            checkpoints.remove()
    except KeyboardInterrupt:
        say(f"interrupted. {checkpoints.way_back()}")
        raise
    finally:
        if is_first_process() and checkpoints.last() is None:
            checkpoints.remove()  # nothing in it that anybody could go on from
    say_result(result)
    say_probes(before, identity.provenance.get("probes", []))
    if note := serving_note(config):
        say(f"note: {note}.")
    return str(config.adapter_dir)


def check_place(config: TrainConfig) -> None:
    """Whether the run may write where it is to.

    Raises:
        BadInput: the output folder cannot be written to or holds something else, or an interrupted run is
            there.
    """
    check_output(config.adapter_dir, config.overwrite)
    Checkpoints(config).require_intended()


def check_needs(config: TrainConfig) -> None:
    """Whether everything else that the run will need is there, before the rows are read.

    Raises:
        MissingPackage: one that `report_to` names.
        TrainingFailed: no server answers where the adapter is to be published.
    """
    if config.publish:
        check_server(config.publish)
    for name in config.report_to:
        packages = _REPORTER_PACKAGES.get(name, ())
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            rule = f"is not installed, and --report-to {name} needs it"
            raise MissingPackage(packages[0], rule, f"Run `pip install {packages[0]}`.")


def make_prober(run: Run, kind: type[Prober] | None = None) -> Prober:
    """The run's probes, stated or taken from the rows.

    Raises:
        BadSetting: a stated one cannot be understood.
    """
    from train.probes import Prober, make_probes

    stated, prompt = run.config.probe, run.config.system_prompt
    probes = make_probes(stated, run.data.rows, run.prepared.form, run.tokenizer, prompt)
    return (kind or Prober)(probes, run.tokenizer)


def check_servable(run: Run) -> None:
    """Ask what a server would say, with a model that has shapes and no weights: for the dry run.

    Raises:
        BadInput: targets name no module, or a server would refuse the adapter.
    """
    if run.config.method == "full":
        _ask_a_server(None, run)
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from train.methods import add_hollow_adapter

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run.config.base_path))
        model = add_hollow_adapter(base, run.config)
    _ask_a_server(model, run)


def _ask_a_server(model: PeftModel | None, run: Run) -> None:
    """Say what a server would; `model` is None where the whole model is trained."""
    from train.serve_check import require_servable, require_servable_model

    if not run.config.serve_check:
        return
    if model is None:
        findings = require_servable_model(run.identity)
    else:
        findings = require_servable(model, run.identity, run.config.base_path)
    for finding in findings:
        say(str(finding))


def servable_model(run: Run, base: PreTrainedModel | None = None) -> Trainable:
    """The model, ready to be trained fast, once it is known that a server will take what comes of it.

    It is made of `base` where one is given, which is changed by it.

    Raises:
        BadInput: targets name no module, a server would refuse the adapter, or the base cannot be loaded.
    """
    import transformers
    from accelerate import PartialState

    from train.answer_loss import use_answer_loss
    from train.attention import use_short_row_attention
    from train.fused import fuse
    from train.methods import add_adapter, prepare_model

    config = run.config
    PartialState()  # of several processes, each gets its GPU
    transformers.set_seed(config.seed)
    model = prepare_model(config) if base is None else add_adapter(base, config)
    _ask_a_server(None if config.method == "full" else model, run)
    causal: Any = model if config.method == "full" else model.get_base_model()
    use_answer_loss(causal)
    use_short_row_attention(causal)
    fuse(model)
    return model


class Begun(NamedTuple):
    """A run's checkpoints, what it is about, and the checkpoint that it goes on from, if any."""

    checkpoints: Checkpoints
    facts: dict[str, str]
    resume_from: Path | None


def begin(config: TrainConfig) -> Begun:
    """Make the folder of the run's checkpoints, or find the run that is to be gone on with.

    Raises:
        BadSetting, TrainingFailed: as `Checkpoints.begin`.
    """
    from accelerate import PartialState

    from train.methods import base_dtype

    checkpoints = Checkpoints(config)
    facts = {
        "data_sha256": digest_of(config.data, config.data_split),
        "base": read_base_model(config.base_path).fingerprint,
        "dtype": str(base_dtype(config)).removeprefix("torch."),
    }
    with PartialState().main_process_first():  # the others look at what the first one has put in order
        resume_from = checkpoints.begin(**facts) if is_first_process() else checkpoints.last()
    return Begun(checkpoints, facts, resume_from)


def _log_beside(config: TrainConfig) -> None:
    """TensorBoard's files go beside the checkpoints, which are removed, unless somebody says where."""
    runs = config.adapter_dir.with_name(f".{config.adapter_dir.name}.runs")
    os.environ["TENSORBOARD_LOGGING_DIR"] = _STATED_RUNS or str(runs)


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
