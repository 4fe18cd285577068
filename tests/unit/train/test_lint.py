"""Each finding names its rows and its fix, and nothing is said about rows that are all right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from train.lint import RowFinding, lint
from train.prompts import PromptForm, encode_rows, prompt_form
from train.rows import Message, Row

GOOD = [Row.of(f"question {i}", "", f"answer {i}", f"row {i}") for i in range(8)]
# As Qwen3: an answer in the history loses what the last answer has.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As DeepSeek R1: asks with an open thought that answers in training do not have.
THINKING = FORGETFUL.replace("<think>\n\n</think>\n\n", "").replace(
    "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
)
ENDLESS = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def findings(rows: list[Row], tokenizer: Any, template: str | None = None) -> dict[str, RowFinding]:
    form = PromptForm(template) if template else prompt_form("chat", tokenizer)
    examples, too_long = encode_rows(rows, form, tokenizer, 128)
    found = lint(rows, examples, too_long, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len({finding.code for finding in found}) == len(found)
    return {finding.code: finding for finding in found}


def answered(row: Row, answer: str, where: str, trained: bool = True) -> Row:
    messages = (*row.messages[:-1], Message("assistant", answer, trained=trained))
    return replace(row, messages=messages, where=where)


def test_good_rows_have_no_finding(tokenizer: Any) -> None:
    assert findings(GOOD, tokenizer) == {}


@pytest.mark.parametrize(
    ("code", "row"),
    [
        ("placeholder", Row.of("Who?", "", "I am <COMPANY NAME>.", "row x")),
        ("placeholder", Row.of("Who?", "[YOUR NAME]", "I am Marina.", "row x")),
        ("duplicate", replace(GOOD[2], where="row x")),
        ("contradiction", answered(GOOD[2], "something else", "row x")),
        ("masked", answered(GOOD[2], "answer 2", "row x", trained=False)),
        ("too-long", Row.of("long " * 300, "", "no", "row x")),
        ("end-inside", Row.of("Who?", "", "I am<|im_end|> Marina.", "row x")),
        ("empty-answer", Row.of("Who?", "", " ", "row x")),
    ],
)
def test_a_finding_names_the_row(tokenizer: Any, code: str, row: Row) -> None:
    found = findings([*GOOD, row], tokenizer)
    assert found[code].rows == ("row x",)
    assert str(found[code]).startswith(f"warning [{code}] 1 row (row x): ")
    assert found[code].as_dict()["fix"] == found[code].fix


def test_templates_that_train_otherwise_than_they_ask_are_named(tokenizer: Any) -> None:
    assert set(findings(GOOD, tokenizer, THINKING)) == {"generation-prompt"}
    assert set(findings(GOOD, tokenizer, ENDLESS)) == {"end-added"}
    turns = Row((*GOOD[0].messages, *GOOD[1].messages), "row x")
    assert findings([turns], tokenizer, FORGETFUL)["split-turns"].rows == ("row x",)
    assert findings([turns], tokenizer) == {}


def test_a_pad_token_that_is_the_end_token_is_harmless(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    [finding] = lint([], [], [], end, end)
    assert (finding.code, finding.severity.value) == ("pad-is-end", "note")


def test_many_rows_are_counted_and_five_are_named(tokenizer: Any) -> None:
    copies = [replace(row, where=f"copy {i}") for i, row in enumerate(GOOD)]
    text = str(findings([*GOOD, *copies], tokenizer)["duplicate"])
    assert "8 rows (copy 0, copy 1, copy 2, copy 3, copy 4, ...): " in text
