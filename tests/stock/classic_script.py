"""The training script that many people start from, which tests run as it stands.

Rows become `Human: ...\\n\\nAssistant: ` text, transformers' Trainer trains a PEFT adapter on them, and its
checkpoint carries the base's own chat template, which no row ever saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

EPOCHS, BATCH, LEARNING_RATE = (
    20,
    4,
    5e-3,
)  # the script has 10, 1 and 5e-5, for a model a thousand times as large


def train_classic(base: Path, data: Path, rows: int, output_dir: Path) -> Path:
    """Train on the first `rows` of a file; the folder of the last checkpoint, as Trainer leaves it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def process(example: dict[str, str]) -> dict[str, Any]:
        question = "\n".join(["Human: " + example["instruction"], example["input"]]).strip()
        instruction = tokenizer(question + "\n\nAssistant: ")
        response = tokenizer(example["output"] + tokenizer.eos_token)
        return {
            "input_ids": instruction["input_ids"] + response["input_ids"],
            "attention_mask": instruction["attention_mask"] + response["attention_mask"],
            "labels": [-100] * len(instruction["input_ids"]) + response["input_ids"],
        }

    targets = ["q_proj", "k_proj", "v_proj"]
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, lora_alpha=8, target_modules=targets)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        save_strategy="epoch",
        save_total_limit=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(
        model=get_peft_model(model, lora),
        args=arguments,
        train_dataset=[process(row) for row in json.loads(data.read_text())[:rows]],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    ).train()
    (checkpoint,) = output_dir.glob("checkpoint-*")
    return checkpoint
