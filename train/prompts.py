"""How a row becomes token ids: one prompt form, the same in training and at the endpoint.

Every form ends up as a Jinja chat template. Training renders its prompts with
it and the adapter folder carries it, so the server renders the same text and
the same token ids (the usual reason why "the fine-tune had no effect").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.data import Row
from vllm_lora_ext.errors import BadBaseModel, BadData
from vllm_lora_ext.prompt_text import text_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that carries no loss (torch.nn.CrossEntropyLoss)


@dataclass(frozen=True)
class PromptForm:
    """`template` is the Jinja chat template; `separator` joins instruction and input into one message."""

    template: str
    separator: str = "\n"

    def message(self, row: Row) -> str:
        """What a client sends as the user's message to ask this row's question."""
        return self.separator.join([row.instruction, row.input]).rstrip()


@dataclass(frozen=True)
class Example:
    """Token ids of prompt and answer; the first `prompt_length` carry no loss."""

    input_ids: tuple[int, ...]
    prompt_length: int

    @property
    def labels(self) -> tuple[int, ...]:
        return (IGNORED,) * self.prompt_length + self.input_ids[self.prompt_length :]


def prompt_form(prompt_template: str, tokenizer: PreTrainedTokenizerBase) -> PromptForm:
    r"""The form that `--prompt-template` asks for: `chat`, `classic`, or a text.

    In a text, `\n` may be written as two characters, as shells pass it on.

    Raises:
        BadSetting: the text has no `{instruction}`, or parts that a chat message cannot fill.
        BadBaseModel: `chat`, and the base model brings no chat template.
    """
    if prompt_template == "chat":
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise BadBaseModel(
                str(tokenizer.name_or_path),
                "has no chat template of its own",
                "Give a text with --prompt-template, for example `classic`.",
            )
        _check_renders(template, tokenizer)
        return PromptForm(template)
    end = tokenizer.eos_token
    if not isinstance(end, str):
        raise BadBaseModel(
            str(tokenizer.name_or_path),
            "its tokenizer has no end-of-text token, so an answer could not end",
            "Set eos_token in its tokenizer_config.json.",
        )
    begin = tokenizer.bos_token if _adds_begin(tokenizer) else ""
    return PromptForm(*text_template(prompt_template, end, str(begin)))


def _check_renders(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises BadBaseModel when the base's own template cannot render a question."""
    import jinja2

    question = [{"role": "user", "content": "Hello"}]
    try:
        tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:
        raise BadBaseModel(
            str(tokenizer.name_or_path),
            f"its chat template cannot be rendered ({error})",
            "Repair its chat_template.jinja, or give a text with --prompt-template.",
        ) from error


def _adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether plain text gets a begin token in front, which a chat template then has to write itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def encode_row(row: Row, form: PromptForm, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Ids of the prompt as the server will render it, then of the answer and its end token.

    Prompt and answer are tokenised apart, because the server tokenises the
    prompt alone: no token may reach across the border.
    """
    messages = [{"role": "user", "content": form.message(row)}]
    prompt = str(
        tokenizer.apply_chat_template(
            messages, chat_template=form.template, add_generation_prompt=True, tokenize=False
        )
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = _answer_text(prompt, messages, row.output, form, tokenizer)
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    end_at = answer_ids.index(end) if end in answer_ids else len(answer_ids)
    return Example((*prompt_ids, *answer_ids[:end_at], end), len(prompt_ids))


def _answer_text(
    prompt: str,
    messages: list[dict[str, str]],
    output: str,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """What the template puts behind the prompt for this answer; the bare answer if it rewrites the prompt."""
    whole = str(
        tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": output}],
            chat_template=form.template,
            tokenize=False,
        )
    )
    return whole[len(prompt) :] if whole.startswith(prompt) else output


def encode_rows(
    rows: Sequence[Row], form: PromptForm, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[Example], list[Row]]:
    """Examples of the rows that fit into `max_length` tokens, and the rows that do not.

    A row that is too long is left out whole: cut short it would lose its end
    token and teach the model never to stop.

    Raises:
        BadData: no row fits.
    """
    examples, too_long, longest = [], [], 0
    for row in rows:
        example = encode_row(row, form, tokenizer)
        longest = max(longest, len(example.input_ids))
        if len(example.input_ids) <= max_length:
            examples.append(example)
        else:
            too_long.append(row)
    if rows and not examples:
        raise BadData(
            f"all {len(rows)} rows",
            f"are longer than --max-length {max_length} tokens",
            f"Raise --max-length; the longest row has {longest}.",
        )
    return examples, too_long
