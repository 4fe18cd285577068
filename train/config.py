"""What a training run is told: one frozen `TrainConfig`. Flags and YAML become one in `arguments.py`.

Each default stands here once, and the command line reads it from here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_lora_ext.errors import BadSetting
from vllm_lora_ext.names import judge_name
from vllm_lora_ext.peft_config import judge_patterns
from vllm_lora_ext.spec import ALLOWED_MAX_LORA_RANKS

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_LINEAR = "all-linear"  # PEFT's word for every linear module but the head
METHODS = ("lora", "dora", "qlora", "full")
INITS = ("default", "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal")
_SERVE_NO_DORA = (
    "Add --no-serve-check to train it all the same: `vllm-lora merge` makes a full model of it, "
    "`vllm-lora convert --max-rank` the closest LoRA. Or use --method lora."
)
_DORA_INITS = ("default", "gaussian", "orthogonal")
REPORTERS = ("none", "tensorboard", "wandb", "mlflow")


def flag(help_text: str, default: Any = dataclasses.MISSING, **options: Any) -> Any:
    """A field whose flag, type and help come from one place."""
    metadata = {"help": help_text, **options}
    return (
        field(metadata=metadata)
        if default is dataclasses.MISSING
        else field(default=default, metadata=metadata)
    )


def default_learning_rate(hidden_size: int) -> float:
    """A peak rate for a base of this width: wider models want smaller steps (docs/decisions.md)."""
    return min(2e-3, 1 / hidden_size)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; the names are those of transformers and TRL."""

    base_model: str = flag("folder or hub id of the base model", metavar="DIR_OR_HUB_ID")
    data: tuple[str, ...] = flag(
        "files of rows (JSON, JSONL, CSV, Parquet), or a dataset's folder or hub id",
        nargs="+",
        metavar="FILE",
    )
    name: str = flag("name of the adapter: what clients send as `model`")
    output_dir: str = flag("folder of adapters; the new one becomes DIR/NAME", metavar="DIR")
    overwrite: bool = flag("replace an adapter of that name, if this tool wrote it", False)
    resume: bool = flag("go on from the last checkpoint of an interrupted run of this name", False)

    data_weights: tuple[float, ...] = flag(
        "how often each of --data is seen per epoch, one number each (default: once)",
        (),
        nargs="+",
        metavar="TIMES",
    )
    data_split: str = flag("which split of a dataset from the hub, or of a dataset's folder", "train")
    columns: tuple[str, ...] = flag(
        "which column of the data is which part, as in instruction=question output=answer",
        (),
        nargs="+",
        metavar="PART=COLUMN",
    )
    skip_bad_rows: bool = flag("leave out rows that cannot be read, and count them", False)
    prompt_template: str = flag(
        "`chat`: the model's own chat template; `classic`: Human/Assistant text; "
        "or a text with {instruction} and {input}",
        "chat",
    )
    system_prompt: str | None = flag(
        "system message of rows that have none; the server sends it too (default: none)", None
    )
    max_length: int = flag("longest row in tokens; a longer one is left out", 256)
    validation_split: float = flag("share of the rows held out for evaluation", 0.1)
    preview: int = flag("print so many rows as token ids and as text, trained parts in colour, and end", 0)
    dry_run: bool = flag("check everything, print counts, steps, memory and time, and end", False)

    num_train_epochs: float = flag("passes over the rows", 20.0)
    max_steps: int = flag("stop after so many steps; -1: by epochs", -1)
    per_device_train_batch_size: int = flag("rows per step", 4)
    gradient_accumulation_steps: int = flag("batches per optimizer step", 1)
    learning_rate: float | None = flag(
        "peak learning rate of AdamW (default: 1 / hidden size of the base, at most 2e-3; "
        "a tenth of it for --method full)",
        None,
    )
    lr_scheduler_type: str = flag(
        "linear, cosine or constant", "cosine", choices=("linear", "cosine", "constant")
    )
    warmup_ratio: float = flag("share of the steps that warm up", 0.05)
    weight_decay: float = flag("weight decay of AdamW", 0.0)
    max_grad_norm: float = flag("gradient clipping", 1.0)
    gradient_checkpointing: bool = flag("compute activations twice to hold less memory", False)

    method: str = flag("what is trained", "lora", choices=METHODS)
    lora_r: int = flag("rank", 16)
    lora_alpha: float = flag("alpha; the update is scaled by alpha / rank", 32.0)
    lora_dropout: float = flag("dropout on the adapter's input", 0.0)
    target_modules: tuple[str, ...] = flag(
        "modules that get an adapter, or all-linear", ALL_PROJECTIONS, nargs="+", metavar="MODULE"
    )
    rank_pattern: tuple[str, ...] = flag(
        "modules with a rank of their own, as in q_proj=8 layers.0.mlp.up_proj=32",
        (),
        nargs="+",
        metavar="MODULE=RANK",
    )
    alpha_pattern: tuple[str, ...] = flag(
        "modules with an alpha of their own", (), nargs="+", metavar="MODULE=ALPHA"
    )
    use_rslora: bool = flag("scale by alpha / sqrt(rank)", False)
    init_lora_weights: str = flag("how the adapter begins", "default", choices=INITS)
    dtype: str = flag(
        "of the base: auto is bf16 where the GPU or CPU computes in it, fp16 on an older GPU, else "
        "fp32. What is trained is fp32",
        "auto",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    serve_check: bool = flag("refuse before the first step what vLLM could not serve", True)

    seed: int = flag("seed of the split, the order and the initial weights", 42)
    logging_steps: int = flag("steps between two lines of loss and token accuracy", 20)
    eval_steps: int = flag("steps between two evaluations of the held-out rows; 0: once per epoch", 0)
    save_steps: int = flag("steps between two checkpoints; 0: at an epoch's end, once a minute at most", 0)
    early_stopping_patience: int = flag("stop after so many evaluations without a better loss; 0: never", 0)
    keep: str = flag(
        "which weights become the adapter: those after the last step, or those with the best held-out loss",
        "last",
        choices=("last", "best"),
    )
    probe: tuple[str, ...] = flag(
        "questions with what the answer must hold, as in 'Who are you?=Marina'; stop when all are right",
        (),
        nargs="+",
        metavar="QUESTION=TEXT",
    )
    publish: str | None = flag(
        "address of a running server that gets the finished adapter, as http://127.0.0.1:8000",
        None,
        metavar="URL",
    )
    report_to: tuple[str, ...] = flag(
        "where figures go besides training_log.jsonl", ("none",), nargs="+", choices=REPORTERS
    )

    def __post_init__(self) -> None:
        for key, holds in self._rules().items():
            if not holds:
                raise BadSetting(
                    f"--{key.replace('_', '-')}",
                    f"{getattr(self, key)!r} is out of range",
                    "Run `vllm-lora train --help` for what it means.",
                )
        for finding in judge_name(self.name):
            raise BadSetting(f"--name {finding.item}", finding.rule, "Choose another --name.")
        patterns = {"rank_pattern": self.ranks, "alpha_pattern": self.alphas}
        for finding in judge_patterns(patterns):
            raise BadSetting(f"--{finding.item.replace('_', '-')}", finding.rule, finding.fix)
        for item, rule, fix in self._contradictions():
            raise BadSetting(item, rule, fix)

    def _contradictions(self) -> Iterator[tuple[str, str, str]]:
        """Settings of which each is in range, and which make no sense together: item, rule, fix."""
        method, init = f"--method {self.method}", f"--init-lora-weights {self.init_lora_weights}"
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            yield "--target-modules", f"{ALL_LINEAR} already means every module", "Name no other beside it."
        if self.method == "full":
            for_lora = ("use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights")
            for item in fields(self):
                if item.name in for_lora and getattr(self, item.name) != item.default:
                    rule = "is about an adapter, and --method full trains none"
                    yield f"--{item.name.replace('_', '-')}", rule, "Leave it out, or use --method lora."
            if self.dtype not in ("auto", "float32"):
                rule = f"cannot be had with {method}, which trains the weights themselves, in float32"
                yield f"--dtype {self.dtype}", rule, "Leave it out; they are saved in the base's own dtype."
        yield from self._impossible_stops()
        if self.method == "dora" and self.init_lora_weights not in _DORA_INITS:
            yield init, f"is not for {method}", f"Use one of {', '.join(_DORA_INITS)}."
        if self.method == "dora" and self.serve_check:
            rule = "vLLM cannot serve DoRA"
            yield method, rule, _SERVE_NO_DORA
        odd = [rank for rank in (self.lora_r, *self.ranks.values()) if rank % 2]
        if self.init_lora_weights == "orthogonal" and odd:
            yield init, f"needs even ranks, and there is {odd[0]}", "Change --lora-r or --rank-pattern."

    def _impossible_stops(self) -> Iterator[tuple[str, str, str]]:
        if self.keep == "best" and self.probe:
            rule = "may keep other weights than those that answered the probes"
            yield "--keep best", rule, "Leave out --probe or --keep."
        for flag, is_set in (
            ("--keep best", self.keep == "best"),
            ("--early-stopping-patience", self.early_stopping_patience > 0),
        ):
            if is_set and not self.validation_split:
                yield flag, "goes by held-out rows, and there are none", "Set --validation-split above 0."

    @property
    def ranks(self) -> dict[str, int]:
        """`--rank-pattern` as PEFT's `rank_pattern`: end of a module's name -> rank.

        Raises:
            BadSetting: a part is not MODULE=RANK.
        """
        return {name: int(rank) for name, rank in _pairs("--rank-pattern", self.rank_pattern, int)}

    @property
    def alphas(self) -> dict[str, float]:
        """`--alpha-pattern` as PEFT's `alpha_pattern`: end of a module's name -> alpha.

        Raises:
            BadSetting: a part is not MODULE=ALPHA.
        """
        return dict(_pairs("--alpha-pattern", self.alpha_pattern, float))

    def _rules(self) -> dict[str, bool]:
        """Setting -> whether it is in range."""
        return {
            "num_train_epochs": 0 < self.num_train_epochs < 1e6,
            "max_steps": self.max_steps == -1 or self.max_steps >= 1,
            "per_device_train_batch_size": self.per_device_train_batch_size >= 1,
            "gradient_accumulation_steps": self.gradient_accumulation_steps >= 1,
            "learning_rate": self.learning_rate is None or 0 < self.learning_rate < 1,
            "warmup_ratio": 0 <= self.warmup_ratio < 1,
            "max_length": self.max_length >= 2,
            "validation_split": 0 <= self.validation_split < 1,
            "weight_decay": 0 <= self.weight_decay < math.inf,
            "max_grad_norm": 0 < self.max_grad_norm < math.inf,
            "lora_r": 1 <= self.lora_r <= ALLOWED_MAX_LORA_RANKS[-1],
            "lora_alpha": 0 < self.lora_alpha < math.inf,
            "lora_dropout": 0 <= self.lora_dropout < 1,
            "logging_steps": self.logging_steps >= 1,
            "eval_steps": self.eval_steps >= 0,
            "save_steps": self.save_steps >= 0,
            "early_stopping_patience": self.early_stopping_patience >= 0,
            "preview": self.preview >= 0,
            "seed": 0 <= self.seed < 2**32,  # what numpy takes
            "target_modules": bool(self.target_modules),
            "data_weights": len(self.data_weights) in (0, len(self.data))
            and all(0 < weight < math.inf for weight in self.data_weights),
        }

    @property
    def base_path(self) -> str:
        """The base as it is noted in the adapter: a hub id, or a folder's full path, good from anywhere."""
        folder = Path(self.base_model)
        return str(folder.resolve()) if folder.is_dir() else self.base_model

    @property
    def adapter_dir(self) -> Path:
        """Where the finished adapter will stand."""
        return Path(self.output_dir) / self.name

    @property
    def checkpoint_dir(self) -> Path:
        """Where a run keeps its checkpoints until it is finished: hidden, so never served."""
        return self.adapter_dir.with_name(f".{self.adapter_dir.name}.training")


def _pairs(flag: str, parts: Sequence[str], number: Callable[[str], float]) -> Iterator[tuple[str, float]]:
    """`name=number` as pairs."""
    seen = set()
    for part in parts:
        name, _, text = part.partition("=")
        try:
            value = number(text)
        except ValueError:
            raise BadSetting(f"{flag} {part}", "is not MODULE=NUMBER", "Write it as in q_proj=8.") from None
        if name in seen:
            raise BadSetting(f"{flag} {part}", f"states {name} a second time", "Leave one of them out.")
        seen.add(name)
        yield name, value


def planned_steps(num_rows: int, config: TrainConfig, processes: int = 1) -> int:
    """Optimizer steps of a run: rows x epochs / batch, rounded up within each epoch."""
    if config.max_steps > 0:
        return config.max_steps
    batches = -(-num_rows // (config.per_device_train_batch_size * processes))
    per_epoch = -(-batches // config.gradient_accumulation_steps)
    return max(1, math.ceil(per_epoch * config.num_train_epochs))
