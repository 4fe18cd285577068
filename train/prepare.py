"""Rows become what is trained on: given a system message, split, weighed, encoded and linted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.config import TrainConfig
from train.data import Data, read_data
from train.lint import RowFinding, lint
from train.prompts import Example, PromptForm, encode_rows, prompt_form
from train.rows import Row, split_rows, weigh_rows, with_system
from vllm_lora_ext.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """What a run trains on and what was left out of it.

    `training` holds each example as often as an epoch sees it. `bad` are the rows that could not be read,
    `too_long` those that do not fit into --max-length.
    """

    form: PromptForm
    training: list[Example]
    held_out: list[Example]
    training_rows: int
    held_out_rows: int
    bad: list[BadData]
    too_long: list[Row]
    findings: list[RowFinding]


def read_configured(config: TrainConfig) -> Data:
    """The rows that the settings name; no model is needed, so what is bad is said at once.

    Raises:
        BadData, BadSetting: as `read_data`.
    """
    return read_data(config.data, config.columns, config.data_split, config.skip_bad_rows)


def prepare(data: Data, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Everything between reading the rows and training on them.

    Raises:
        BadData: no row fits into --max-length, or the chat template cannot render one.
        BadSetting, BadBaseModel: as `prompt_form`.
    """
    form = prompt_form(config.prompt_template, tokenizer)
    rows = with_system(data.rows, config.system_prompt)
    training_rows, held_out_rows = split_rows(rows, config.validation_split, config.seed)
    bad: list[BadData] | None = [] if config.skip_bad_rows else None
    once, too_long = encode_rows(training_rows, form, tokenizer, config.max_length, bad)
    held_out, _ = encode_rows(held_out_rows, form, tokenizer, None, bad)
    training = once
    if config.data_weights:
        weighed = weigh_rows(training_rows, config.data_weights, config.seed)
        # What the template refused has been counted.
        training, _ = encode_rows(weighed, form, tokenizer, config.max_length, None if bad is None else [])
    refused = {error.item for error in bad or ()}
    findings = lint(
        [row for row in rows if row.where not in refused],
        [*once, *held_out],
        too_long,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return Prepared(
        form,
        training,
        held_out,
        sum(row.where not in refused for row in training_rows) - len(too_long),
        sum(row.where not in refused for row in held_out_rows),
        [*data.bad, *(bad or ())],
        too_long,
        findings,
    )
