"""Base and adapter answer the same question side by side, with transformers and PEFT, no server."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from train.model import attach_adapter, load_base, load_tokenizer, training_dtype
from vllm_lora_ext.base_model import read_base_model
from vllm_lora_ext.errors import BadInput, BadSetting
from vllm_lora_ext.inspection import Rules, inspect_adapter, require_admitted
from vllm_lora_ext.peft_format import CONFIG_FILE

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answers:
    """What the base says (rendered by its own template) and what the adapter says (by its own)."""

    base: str
    adapter: str


def base_model_of(adapter_dir: Path, stated: str | None) -> str:
    """The base model to use: the stated one, else the one in the adapter's config.

    Raises:
        BadSetting: there is no such folder, or neither names a base.
    """
    if not adapter_dir.is_dir():
        raise BadSetting(str(adapter_dir), "no such folder", "Check the path of the adapter.")
    if stated:
        return stated
    path = adapter_dir / CONFIG_FILE
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError, RecursionError):
        named = None
    if not isinstance(named, str) or not named:
        raise BadSetting(str(path), "does not name its base model", "Give it with --base-model.")
    return named


class LocalChat:
    """A base with one adapter in memory; the base answers with the adapter switched off.

    Findings of the codes in `allow` do not refuse the adapter, where that is safe.

    Raises:
        AdapterRefused: the adapter does not fit the base, or must not be used.
        BadBaseModel, BadSetting: the base cannot be read, or is not named anywhere.
        BadInput: PEFT cannot load the adapter.
    """

    def __init__(self, adapter_dir: Path, base_model: str | None = None, allow: Collection[str] = ()) -> None:
        base_name = base_model_of(adapter_dir, base_model)
        inspection = inspect_adapter(adapter_dir, Rules(read_base_model(base_name), allow=frozenset(allow)))
        require_admitted(inspection)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base_name)
        base: PreTrainedModel = load_base(base_name, training_dtype("auto"))
        self.model: PeftModel = attach_adapter(base, adapter_dir)
        self.model.eval()
        self.adapter_template = inspection.chat.template

    def ask(self, question: str, max_tokens: int = 128) -> Answers:
        """Greedy answers of both, each to the prompt that its own template makes."""
        with self.model.disable_adapter():
            base = self._generate(question, None, max_tokens)
        return Answers(base, self._generate(question, self.adapter_template, max_tokens))

    def _generate(self, question: str, template: str | None, max_tokens: int) -> str:
        inputs = self.prompt(question, template)
        out = self.model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
        answer = out[0, inputs["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()

    def prompt(self, question: str, template: str | None) -> BatchEncoding:
        """Ids of shape (1, tokens) on the model's device; `template` None means the base's own, if any.

        Raises:
            BadInput: the template cannot be rendered.
        """
        if template is None and self.tokenizer.chat_template is None:
            inputs = self.tokenizer(question, return_tensors="pt")
        else:
            inputs = self._render(question, template)
        return inputs.to(self.model.device)

    def _render(self, question: str, template: str | None) -> BatchEncoding:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                chat_template=template,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
            )
        except (jinja2.TemplateError, TypeError) as error:
            rule = f"cannot be rendered ({error})"
            raise BadInput("the chat template", rule, "Repair chat_template.jinja.") from error
