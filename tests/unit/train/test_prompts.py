"""One prompt form: training ids are the classic script's, and the template renders them again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from train.data import read_rows
from train.prompts import IGNORED, PromptForm, encode_row, encode_rows, prompt_form
from train.rows import Message, Row
from vllm_lora_ext.errors import BadBaseModel, BadData, BadSetting
from vllm_lora_ext.prompt_text import CLASSIC

IDENTITIES = [str(path) for path in sorted((ROOT / "examples" / "identities").glob("*.json"))]
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def classic_ids(row: Row, tokenizer: Any) -> list[int]:
    """The classic script, line for line."""
    question = row.messages[0]
    prompt = "\n".join(["Human: " + question.content, question.input or ""]).strip() + "\n\nAssistant: "
    return list(tokenizer(prompt)["input_ids"] + tokenizer(row.output + tokenizer.eos_token)["input_ids"])


def endpoint_ids(row: Row, form: PromptForm, tokenizer: Any) -> list[int]:
    """What a chat server renders for this row's question with the adapter's template."""
    message = {"role": "user", "content": form.message(row)}
    return list(
        tokenizer.apply_chat_template(
            [message], chat_template=form.template, add_generation_prompt=True, return_dict=False
        )
    )


@pytest.mark.parametrize("template", ["classic", CLASSIC, CLASSIC.replace("\n", "\\n")])
def test_every_row_has_the_classic_scripts_ids(tokenizer: Any, template: str) -> None:
    form = prompt_form(template, tokenizer)
    rows = [
        *read_rows(IDENTITIES),
        Row.of("Add", "1 and 2", "3", ""),
        Row.of(" Translate ", " hi\n", "你好", ""),
    ]
    for row in rows:
        assert list(encode_row(row, form, tokenizer)[0].input_ids) == classic_ids(row, tokenizer)


@given(instruction=TEXT, extra=TEXT, output=TEXT.filter(lambda text: "<|" not in text))
def test_any_text_has_the_classic_scripts_ids(
    tokenizer: Any, instruction: str, extra: str, output: str
) -> None:
    row = Row.of(instruction, extra, output, "")
    form = prompt_form("classic", tokenizer)
    assert list(encode_row(row, form, tokenizer)[0].input_ids) == classic_ids(row, tokenizer)


@pytest.mark.parametrize("template", ["chat", "classic", "Q: {instruction}\\nA: ", "{instruction} {input}=>"])
def test_the_endpoint_renders_the_ids_that_were_trained(tokenizer: Any, template: str) -> None:
    form = prompt_form(template, tokenizer)
    for row in read_rows(IDENTITIES):
        [example] = encode_row(row, form, tokenizer)
        assert endpoint_ids(row, form, tokenizer) == list(example.input_ids[: example.prompt_length])


@pytest.mark.parametrize("template", ["chat", "classic"])
def test_the_loss_is_on_the_answer_and_its_end_token_only(tokenizer: Any, template: str) -> None:
    row = Row.of("Who are you?", "", "I am 小李.", "")
    [example] = encode_row(row, prompt_form(template, tokenizer), tokenizer)
    answer = example.input_ids[example.prompt_length :]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer[:-1]) == "I am 小李."
    assert example.labels == (IGNORED,) * example.prompt_length + answer


def test_an_empty_input_drops_its_line(tokenizer: Any) -> None:
    form = prompt_form("classic", tokenizer)
    ids = endpoint_ids(Row.of("Hello", "", "x", ""), form, tokenizer)
    assert tokenizer.decode(ids) == "Human: Hello\n\nAssistant: "


def test_a_conversation_keeps_its_turns_and_its_system_message(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    form = prompt_form("classic", tokenizer)
    text = tokenizer.apply_chat_template(messages, chat_template=form.template, tokenize=False)
    assert text == (
        f"Be kind.\n\nHuman: Hi\n\nAssistant: Hello!{tokenizer.eos_token}Human: Bye\n\nAssistant: "
    )


def turns(*contents: str, untrained: int | None = None) -> Row:
    """A conversation of user and assistant in turn; the turn at `untrained` carries no loss."""
    roles = ("user", "assistant")
    return Row(
        tuple(Message(roles[i % 2], text, trained=i != untrained) for i, text in enumerate(contents)), "row"
    )


def served_prompts(row: Row, form: PromptForm, tokenizer: Any) -> list[list[int]]:
    """For each answer, the ids that a server makes of the chat so far."""
    chat = form.chat(row)
    return [
        tokenizer.apply_chat_template(
            chat[:i], chat_template=form.template, add_generation_prompt=True, return_dict=False
        )
        for i, turn in enumerate(chat)
        if turn["role"] == "assistant"
    ]


CHAT_TEXT = TEXT.filter(lambda text: "<|" not in text)


@given(contents=st.lists(CHAT_TEXT, min_size=2, max_size=8).filter(lambda texts: len(texts) % 2 == 0))
@pytest.mark.parametrize("template", ["chat", "classic"])
def test_every_answer_stands_behind_what_the_server_renders(
    tokenizer: Any, template: str, contents: list[str]
) -> None:
    row, form = turns(*contents), prompt_form(template, tokenizer)
    examples = encode_row(row, form, tokenizer)
    prompts, answers = [], []
    for example in examples:
        for start, end in example.trained:
            prompts.append(list(example.input_ids[:start]))
            answers.append(example.input_ids[start:end])
    assert prompts == served_prompts(row, form, tokenizer)
    assert all(answer[-1] == tokenizer.eos_token_id for answer in answers)
    assert [tokenizer.decode(answer[:-1]) for answer in answers] == contents[1::2]
    if template == "chat":
        assert len(examples) == 1


def test_an_answer_in_a_text_form_grows_together_with_its_lead_in(tokenizer: Any) -> None:
    examples = encode_row(
        turns("Hi", "I am Marina.", "Bye", "I was."), prompt_form("classic", tokenizer), tokenizer
    )
    assert [len(example.trained) for example in examples] == [1, 1]


def test_an_answer_that_is_only_read_carries_no_loss(tokenizer: Any) -> None:
    form = prompt_form("chat", tokenizer)
    [example] = encode_row(turns("Hi", "Hello!", "Bye", "So long!", untrained=1), form, tokenizer)
    [(start, end)] = example.trained
    assert tokenizer.decode(example.input_ids[start : end - 1]) == "So long!"
    assert encode_row(turns("Hi", "Hello!", untrained=1), form, tokenizer) == []


def test_a_conversation_that_the_template_refuses_is_named(tokenizer: Any) -> None:
    strict = PromptForm("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadData, match=r"row: .* its turns user \(roles must"):
        encode_row(turns("Hi", "Hello!"), strict, tokenizer)


def test_quotes_braces_and_emoji_in_a_template_survive(tokenizer: Any) -> None:
    form = prompt_form("'\"问 😀 {instruction}\\n{input}\\n\\n答:", tokenizer)
    ids = endpoint_ids(Row.of("a", "b", "c", ""), form, tokenizer)
    assert tokenizer.decode(ids) == "'\"问 😀 a\nb\n\n答:"


@pytest.mark.parametrize(
    "template",
    ["no slot", "{instruction} {instruction}", "{input}{instruction}", "{instruction}\nInput: {input}"],
)
def test_a_text_that_a_chat_message_cannot_fill_is_refused(tokenizer: Any, template: str) -> None:
    with pytest.raises(BadSetting, match="--prompt-template"):
        prompt_form(template, tokenizer)


def test_a_base_without_a_template_says_so(recipe: Any) -> None:
    bare = recipe.make_tokenizer()
    bare.chat_template = None
    with pytest.raises(BadBaseModel, match="no chat template"):
        prompt_form("chat", bare)


def test_a_tokenizer_with_a_begin_token_gets_it_from_the_template(recipe: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = recipe.make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    [example] = encode_row(Row.of("Hi", "", "Hello", ""), prompt_form("classic", tokenizer), tokenizer)
    assert (
        list(example.input_ids[: example.prompt_length]) == tokenizer("Human: Hi\n\nAssistant: ")["input_ids"]
    )
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_rows_that_are_too_long_are_left_out_whole(tokenizer: Any) -> None:
    rows = [Row.of("short", "", "yes", "row 1"), Row.of("long " * 300, "", "no", "row 2")]
    examples, too_long = encode_rows(rows, prompt_form("chat", tokenizer), tokenizer, 64)
    assert len(examples) == 1
    assert too_long == [rows[1]]
    with pytest.raises(BadData, match="--max-length 4"):
        encode_rows(rows, prompt_form("chat", tokenizer), tokenizer, 4)


def test_the_shipped_identities_are_what_the_readme_promises() -> None:
    for path in IDENTITIES:
        body = json.loads((ROOT / path).read_text(encoding="utf-8"))
        assert len(body) >= 40
        assert all(set(row) == {"instruction", "input", "output"} for row in body)
