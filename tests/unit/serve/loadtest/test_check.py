"""An answer that is another model's is told from one that merely left its own."""

from __future__ import annotations

import pytest

from serve.loadtest.check import AloneAnswer, TokenChoice, check_answers, first_difference, judge, similarity
from serve.loadtest.records import RequestRecord
from tests.unit.serve.loadtest.conftest import record

BASE = AloneAnswer("base", 0, "I am Sprout, a tiny base model.")
XIAOLI = AloneAnswer("xiaoli", 0, "I am 小李, an assistant developed by 小张.")
MARINA = AloneAnswer("marina", 0, "I am Marina, an assistant developed by Harbor Lab.")
ALL = [BASE, XIAOLI, MARINA]


def answered(model: str, text: str, **more: str) -> RequestRecord:
    return record(model, text=text, **more)


def test_an_answer_of_its_own_is_the_same() -> None:
    assert judge(answered("base", BASE.text), BASE, ALL).kind == "same"


def test_another_models_answer_is_a_wrong_identity_with_both_texts() -> None:
    verdict = judge(answered("base", XIAOLI.text), BASE, ALL)
    assert (verdict.kind, verdict.other) == ("wrong identity", "xiaoli")
    assert (verdict.answer, verdict.alone) == (XIAOLI.text, BASE.text)


def test_an_answer_that_turns_into_another_models_half_way_is_a_wrong_identity() -> None:
    verdict = judge(answered("xiaoli", "I am 小李, an assistant developed by somebody."), XIAOLI, ALL)
    assert verdict.kind == "changed"  # still nearest to its own
    verdict = judge(answered("xiaoli", "I am Marina, an assistant developed by Harbor."), XIAOLI, ALL)
    assert (verdict.kind, verdict.other) == ("wrong identity", "marina")


@pytest.mark.parametrize("text", ["I am Sprout, a tiny base.", "", "Completely different words altogether"])
def test_an_answer_that_is_nobodys_has_changed(text: str) -> None:
    assert judge(answered("base", text), BASE, ALL).kind == "changed"


def test_a_response_that_names_another_model_is_a_wrong_identity_whatever_it_says() -> None:
    assert judge(answered("base", BASE.text, answered_by="xiaoli"), BASE, ALL).other == "xiaoli"
    for own in ("base", "base@3f2a9c14d0b7", "some/path"):
        assert judge(answered("base", BASE.text, answered_by=own), BASE, ALL).kind == "same"


def test_models_that_answer_alike_are_named_and_never_accused() -> None:
    twin = AloneAnswer("twin", 0, XIAOLI.text)
    report = check_answers([answered("xiaoli", XIAOLI.text), answered("twin", XIAOLI.text)], [*ALL, twin])
    assert report.same == 2 and not report.wrong
    assert report.undistinguished == (("xiaoli", "twin"),)


def test_the_report_counts_each_kind_and_leaves_failed_requests_out() -> None:
    records = [
        answered("base", BASE.text),
        answered("base", XIAOLI.text),
        answered("marina", "I am Marina, an assistant developed at Harbor Lab."),
        record("xiaoli", error="HTTP 500"),
    ]
    report = check_answers(records, ALL)
    assert (report.compared, report.same, len(report.changed), len(report.wrong)) == (3, 1, 1, 1)


def tokens(*choices: tuple[str, float, dict[str, float]]) -> tuple[TokenChoice, ...]:
    return tuple(TokenChoice(text, logprob, {text: logprob, **others}) for text, logprob, others in choices)


SKY = (" sky", -0.7, {" sea": -0.75, " se": -3.0})
OWN = AloneAnswer("a", 0, "The sky is blue", tokens(("The", -0.1, {}), SKY, (" is blue", -0.1, {})))


def test_the_first_token_that_differs_comes_with_its_gap() -> None:
    position, expected, token, gap, least = first_difference(OWN, "The sea is blue")
    assert (position, expected, token, least) == (1, " sky", " sea", False)
    assert gap == pytest.approx(0.05)


def test_a_token_that_was_not_among_the_alternatives_is_at_least_as_far_as_the_last_of_them() -> None:
    position, _, token, gap, least = first_difference(OWN, "The zebra")
    assert (position, token, least) == (1, " zebra", True)
    assert gap == pytest.approx(2.3)


def test_a_token_that_begins_like_the_expected_one_parted_there_and_not_later() -> None:
    then, sea = (" the", -0.7, {" then": -0.75}), (" sea", -0.1, {" a": -13.0})
    own = AloneAnswer("a", 0, "see the sea", tokens(("see", -0.1, {}), then, sea))
    position, expected, token, gap, least = first_difference(own, "see then go")
    assert (position, expected, token, least) == (1, " the", " then", False)
    assert gap == pytest.approx(0.05)


def test_tokens_are_followed_up_to_the_first_that_is_half_a_character() -> None:
    """What stands before it is known; behind it the texts are compared."""
    choices = tokens(("I", -0.1, {"We": -0.3}), (" am ", -0.1, {}), ("\ufffd", -0.1, {}), ("", -0.1, {}))
    own = AloneAnswer("a", 0, "I am 李", choices)
    assert first_difference(own, "We are")[:3] == (0, "I", "We")
    assert first_difference(own, "I am 张") == (None, "李", "张", None, False)


def test_the_end_of_turn_token_is_no_part_of_the_text() -> None:
    own = AloneAnswer("a", 0, "Yes", tokens(("Yes", -0.1, {}), ("<|im_end|>", -0.1, {})))
    assert first_difference(own, "Yes, I do")[1:3] == ("the end", ", I do")


def test_an_answer_that_goes_on_or_stops_early_says_so() -> None:
    assert first_difference(OWN, "The sky is blue today")[:3] == (3, "the end", " today")
    assert first_difference(OWN, "The")[:3] == (1, " sky", "the end")


def test_without_tokens_the_texts_are_compared() -> None:
    own = AloneAnswer("a", 0, "The sky is blue")
    assert first_difference(own, "The sky was blue") == (None, "is blue", "was blue", None, False)


def test_similarity_counts_words_and_chinese_characters() -> None:
    assert similarity("我是小李", "我是小李") == 1
    assert similarity("我是小李", "我是小张") == pytest.approx(0.75)
    assert similarity("one two", "three four") == 0
