"""What is shown of a row: ids and text, the trained parts marked without colour too, nothing that acts."""

from __future__ import annotations

import io
from typing import Any

from train.preview import first_rows, preview, preview_dict
from train.prompts import Example, encode_row, prompt_form
from train.rows import Message, Row

ROW = Row.of("Who?", "", "小李 [x]\x1b[31m", "a.json row 1")
TURNS = Row((*ROW.messages, Message("user", "Bye"), Message("assistant", "So long")), "a.json row 2")


def shown(row: Row, tokenizer: Any) -> tuple[Example, str]:
    [example] = encode_row(row, prompt_form("chat", tokenizer), tokenizer)
    file = io.StringIO()
    preview([example], tokenizer, 1, file)
    return example, file.getvalue()


def test_what_is_trained_is_marked_without_colour(tokenizer: Any) -> None:
    example, text = shown(ROW, tokenizer)
    place, ids, *rendered = text.splitlines()
    assert place == f"a.json row 1: {len(example.input_ids)} tokens, {example.trained_tokens} of them trained"
    [(start, end)] = example.trained
    assert ids.endswith(f"[{' '.join(map(str, example.input_ids[start:end]))}]")
    assert "⟦小李 [x]\\x1b[31m<|im_end|>⟧" in "\n".join(rendered)
    assert "\x1b" not in text


def test_every_turn_is_marked(tokenizer: Any) -> None:
    _, text = shown(TURNS, tokenizer)
    assert text.count("⟦") == text.count("⟧") == 2


def test_as_json_it_is_in_parts_that_join_to_the_whole(tokenizer: Any) -> None:
    example, _ = shown(TURNS, tokenizer)
    body = preview_dict(example, tokenizer)
    assert [part["trained"] for part in body["text"]] == [False, True, False, True]
    assert "".join(part["text"] for part in body["text"]) == tokenizer.decode(list(example.input_ids))
    assert body["trained"] == [list(span) for span in example.trained]


def test_rows_are_counted_and_not_their_examples() -> None:
    examples = [Example((1,), ((0, 1),), where) for where in ("a", "a", "b", "c")]
    assert first_rows(examples, 2) == examples[:3]
