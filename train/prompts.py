"""How a row becomes token ids: one prompt form, the same in training and at the endpoint.

Every form ends up as a Jinja chat template. Training renders its prompts with
it and the adapter folder carries it, so the server renders the same text and
the same token ids (the usual reason why "the fine-tune had no effect").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.data import refusal
from train.rows import ASSISTANT, USER, Message, Row
from vllm_lora_ext.errors import BadBaseModel, BadData
from vllm_lora_ext.prompt_text import text_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of a token that carries no loss (torch.nn.CrossEntropyLoss)
REWRITTEN = "rewritten"  # the template writes something else in front of an answer than it asks with
END_ADDED = "end added"  # the template does not end an answer with the end token
CUT = "cut"  # the answer's own text holds the end token, and ends there


@dataclass(frozen=True)
class PromptForm:
    """`template` is the Jinja chat template; `separator` joins instruction and input into one message."""

    template: str
    separator: str = "\n"

    def text(self, message: Message) -> str:
        """A turn as a client sends it: one text."""
        if message.input is None:
            return message.content
        return self.separator.join([message.content, message.input]).rstrip()

    def message(self, row: Row) -> str:
        """What a client sends as the user's message to ask this row's last question."""
        return self.text([turn for turn in row.messages if turn.role == USER][-1])

    def chat(self, row: Row) -> list[dict[str, str]]:
        """All turns of the row as a client sends them."""
        return [{"role": turn.role, "content": self.text(turn)} for turn in row.messages]


@dataclass(frozen=True)
class Example:
    """Token ids of a conversation; `trained` are the (start, end) of the tokens that carry loss.

    The spans are in order and do not overlap: each is an answer with its end token. `where` is the row's
    place; `quirks` are what the template did that the lint should know.
    """

    input_ids: tuple[int, ...]
    trained: tuple[tuple[int, int], ...]
    where: str = ""
    quirks: frozenset[str] = frozenset()

    @property
    def labels(self) -> tuple[int, ...]:
        """As long as `input_ids`: a trained token's id, `IGNORED` elsewhere."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.trained:
            labels[start:end] = self.input_ids[start:end]
        return tuple(labels)

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return sum(end - start for start, end in self.trained)

    @property
    def prompt_length(self) -> int:
        """How many tokens stand in front of the first answer that is trained."""
        return self.trained[0][0]


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


def encode_row(row: Row, form: PromptForm, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The row's conversation as few examples as the template allows: one, unless it rewrites earlier turns.

    In front of each answer stand exactly the ids that the server makes of the chat so far. Prompt and
    answer are tokenised apart, because the server tokenises the prompt alone: no token may reach across the
    border. Where the ids so far are no beginning of the next prompt (Qwen3 drops earlier thoughts, a text
    form's lead-in grows together with the answer), a new example begins, whose earlier answers carry no
    loss again. A row whose answers are all untrained has no example.

    Raises:
        BadData: the template cannot render the conversation.
    """
    chat = form.chat(row)
    examples: list[Example] = []
    ids: list[int] = []
    trained: list[tuple[int, int]] = []
    quirks: set[str] = set()

    def finish() -> None:
        if trained:
            examples.append(Example(tuple(ids), tuple(trained), row.where, frozenset(quirks)))

    for place, message in enumerate(row.messages):
        if message.role != ASSISTANT:
            continue
        prompt = _render(chat[:place], True, row, form, tokenizer)
        prompt_ids = _ids(prompt, tokenizer)
        if prompt_ids[: len(ids)] != ids:
            finish()
            trained, quirks = [], set()
        answer, seen = _answer_ids(prompt, chat[: place + 1], row, form, tokenizer)
        ids = prompt_ids + answer
        if message.trained:
            trained.append((len(prompt_ids), len(ids)))
            quirks |= seen
    finish()
    return examples


def _answer_ids(
    prompt: str, chat: list[dict[str, str]], row: Row, form: PromptForm, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], set[str]]:
    """Ids of the last turn as the template writes it behind `prompt`, with the end token; and quirks."""
    output, quirks = chat[-1]["content"], set()
    whole = _render(chat, False, row, form, tokenizer)
    if whole.startswith(prompt):
        answer = whole[len(prompt) :]
    else:
        answer = output
        quirks.add(REWRITTEN)
    ids, end = _ids(answer, tokenizer), tokenizer.eos_token_id
    if end not in ids:
        if REWRITTEN not in quirks:
            quirks.add(END_ADDED)
        return [*ids, end], quirks
    if str(tokenizer.eos_token) in output:
        quirks.add(CUT)
    return ids[: ids.index(end) + 1], quirks


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _render(
    chat: list[dict[str, str]],
    asks: bool,
    row: Row,
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
) -> str:
    """The chat as text; with `asks`, ending where an answer begins."""
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            chat, chat_template=form.template, add_generation_prompt=asks, tokenize=False
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in chat)
        raise BadData(
            row.where,
            f"the chat template cannot render its turns {roles} ({error})",
            "Change the row, or choose another --prompt-template.",
        ) from error
    return str(text)


def encode_rows(
    rows: Sequence[Row],
    form: PromptForm,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    bad: list[BadData] | None = None,
) -> tuple[list[Example], list[Row]]:
    """Examples of the rows that fit into `max_length` tokens, and the rows that do not.

    A row that is too long is left out whole: cut short it would lose its end
    token and teach the model never to stop. Without `max_length`, as for rows
    held out, every row fits and none need be left. Rows that the template
    cannot render go to `bad` if a list is given.

    Raises:
        BadData: the template cannot render some rows, and `bad` is None; or no row is left to train on.
    """
    examples: list[Example] = []
    too_long: list[Row] = []
    refused: list[BadData] = []
    longest = 0
    for row in rows:
        try:
            made = encode_row(row, form, tokenizer)
        except BadData as error:
            refused.append(error)
            continue
        length = max((len(example.input_ids) for example in made), default=0)
        longest = max(longest, length)
        if max_length is None or length <= max_length:
            examples += made
        else:
            too_long.append(row)
    if refused and (bad is None or (len(refused) == len(rows) and max_length is not None)):
        raise refusal(refused, len(rows) - len(refused))
    if bad is not None:
        bad += refused
    if rows and not examples and max_length is not None:
        raise BadData(
            f"all {len(rows)} rows",
            f"are longer than --max-length {max_length} tokens" if too_long else "have no answer to train on",
            f"Raise --max-length; the longest row has {longest}." if too_long else "Remove `weight`: 0.",
        )
    return examples, too_long
