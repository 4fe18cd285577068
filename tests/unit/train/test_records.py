"""Records of every layout become the same rows; what cannot be trained on is refused with the part's name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.formats import Record
from train.records import parse_columns, row_of
from train.rows import Message, Row
from vllm_lora_ext.errors import BadData, BadSetting

QUESTION, ANSWER = Message("user", "Who?"), Message("assistant", "Marina")
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Marina"}]


def row(value: Any, *columns: str) -> Row:
    return row_of(Record(value, "rows.json row 1"), parse_columns(columns))


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ({"input": "Who?", "target": "Marina"}, ()),
        ({"prompt": "Who?", "completion": "Marina"}, ()),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, ()),
        ({"prompt": TURNS[:1], "completion": "Marina"}, ()),
        ({"messages": TURNS}, ()),
        ({"messages": str(TURNS).replace("'", '"')}, ()),
        ({"messages": [{**turn, "tool_calls": None, "weight": 1} for turn in TURNS]}, ()),
        ({"messages": [{**TURNS[0], "content": [{"type": "text", "text": "Who?"}]}, TURNS[1]]}, ()),
        ({"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Marina"}]}, ()),
        ({"id": 1, "chat": TURNS}, ("messages=chat",)),
        ({"q": "Who?", "a": "Marina", "messages": None}, ("input=q", "output=a")),
    ],
)
def test_every_layout_is_the_same_conversation(value: Any, columns: tuple[str, ...]) -> None:
    assert row(value, *columns).messages == (QUESTION, ANSWER)


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ({"instruction": "Add", "input": "1 and 2", "output": "3"}, ()),
        ({"instruction": "Add", "input": "1 and 2", "output": "3", "target": "x"}, ()),
        ({"do": "Add", "with": "1 and 2", "say": "3"}, ("instruction=do", "input=with", "output=say")),
        ({"instruction": "Add", "input": "1 and 2", "target": "3"}, ("output=target",)),
    ],
)
def test_an_instruction_keeps_its_two_parts(value: Any, columns: tuple[str, ...]) -> None:
    assert row(value, *columns) == Row.of("Add", "1 and 2", "3", "rows.json row 1")


def test_question_and_answer_columns_need_no_input() -> None:
    found = row({"question": "Who?", "answer": "Marina"}, "instruction=question", "output=answer")
    assert found == Row.of("Who?", "", "Marina", "rows.json row 1")


def test_a_system_message_comes_from_its_column_unless_the_turns_have_one() -> None:
    system = Message("system", "Be kind.")
    assert row({"instruction": "a", "output": "b", "system": "Be kind."}).messages[0] == system
    assert row({"messages": TURNS, "rule": "Be kind."}, "system=rule").messages == (system, QUESTION, ANSWER)
    own = [{"role": "system", "content": "Be kind."}, *TURNS]
    assert row({"messages": own, "system": "Be rude."}).messages == (system, QUESTION, ANSWER)


def test_several_turns_and_an_answer_that_is_only_read() -> None:
    found = row({"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]})
    assert [(turn.role, turn.trained) for turn in found.messages] == [
        ("user", True),
        ("assistant", False),
        ("user", True),
        ("assistant", True),
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be an object, is a NoneType"),
        ({}, "has no `instruction`, has nothing"),
        ({"frage": "a"}, "has no `instruction`, has frage. Say which column is which, as in --columns"),
        ({"messages": []}, "`messages` must be a list of turns, is empty"),
        ({"messages": "Who?"}, "`messages` is a text that is no JSON"),
        ({"messages": {"role": "user"}}, "must be a list of turns, is dict"),
        ({"messages": ["Who?"]}, "turn 1 of `messages` must be an object"),
        ({"messages": TURNS[:1]}, "must end with the assistant's turn"),
        ({"messages": TURNS[1:]}, "must begin with the user's turn"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "turn 1 .* role 'critic'. Roles are system"),
        ({"messages": [{"content": "a"}]}, "has the role None"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "has the role"),
        ({"messages": [TURNS[0], {"role": "tool", "content": "4"}]}, "turn 2 .* calls a tool or answers for"),
        ({"messages": [TURNS[0], {"role": "assistant", "tool_calls": [{}]}]}, "turn 2 .* calls a tool"),
        ({"conversations": [{"from": "function_call", "value": "f"}]}, "turn 1 of `conversations` calls a"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "a part that is no text"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "turn 2 of `messages` is empty"),
        ({"messages": [TURNS[0], {"role": "assistant"}]}, "turn 2 .* must be text, is a NoneType"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, "has the weight 0.5"),
        ({"prompt": "a", "completion": ""}, "`completion` is empty"),
        ({"prompt": "a", "completion": 10**400}, "`completion` must be text, is a int"),
        ({"input": "I am <NAME>", "target": "b"}, "holds <NAME>, a placeholder"),
        ({"messages": [{"role": "system", "content": "{{x}}"}, *TURNS]}, r"holds \{\{x\}\}"),
    ],
)
def test_what_cannot_be_trained_on_is_named(value: Any, message: str) -> None:
    with pytest.raises(BadData, match=f"^rows.json row 1: .*{message}"):
        row(value)


@pytest.mark.parametrize(
    "columns", [["output"], ["output="], ["answer=b"], ["output=a", "output=b"], ["messages=a", "output=b"]]
)
def test_columns_that_cannot_be_understood_are_refused(columns: list[str]) -> None:
    with pytest.raises(BadSetting, match="--columns"):
        parse_columns(columns)


KEYS = st.sampled_from(
    [
        *("instruction", "input", "output", "target", "prompt", "completion", "messages", "conversations"),
        *("system", "role", "from", "content", "value", "weight", "tool_calls", "type", "text"),
    ]
)
WORDS = st.sampled_from(["user", "assistant", "system", "human", "gpt", "text", "{{a}}", "", "hi", "\ud800"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=15,
)


@given(value=st.dictionaries(KEYS, VALUES, max_size=5))
def test_no_record_crashes(value: Any) -> None:
    try:
        found = row(value)
    except BadData as error:
        assert error.item == "rows.json row 1" and error.rule and error.fix
    else:
        assert found.messages[-1].role == "assistant"
