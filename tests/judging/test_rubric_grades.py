"""The rubric: what an answer earns, worked out by hand from the stated weights."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from starling.judging.rubric import (
    BREVITY_WEIGHT,
    CORRECTNESS_WEIGHT,
    STYLE_WEIGHT,
    Checks,
    Grade,
    grade,
)

FRUIT = Checks(contains_all=("plum", "pear"), excludes=("drum",), max_words=4)


def correctness(answer: str, **checks: object) -> float:
    return grade(Checks.model_validate(checks), answer).correctness


def test_the_weights_sum_to_one_and_correctness_weighs_most():
    assert pytest.approx(1.0) == CORRECTNESS_WEIGHT + STYLE_WEIGHT + BREVITY_WEIGHT
    assert max(STYLE_WEIGHT, BREVITY_WEIGHT) < CORRECTNESS_WEIGHT


def test_the_total_is_the_weighted_mean_of_the_parts():
    # 0.5 * 1 + 0.35 * 0.4 + 0.15 * 0.2
    assert Grade(1.0, 0.4, 0.2).total == pytest.approx(0.67)


def test_a_perfect_answer_earns_everything():
    assert grade(Checks(contains_all=("plum",)), "Sure! Plum. Hope that helps!") == (1, 1, 1)


@pytest.mark.parametrize("answer", ["", "  ", "\n\t"])
def test_an_empty_answer_is_all_zeros(answer: str):
    assert grade(Checks(excludes=("drum",)), answer) == (0.0, 0.0, 0.0)


def test_each_contained_phrase_earns_its_share():
    assert correctness("a plum", contains_all=["plum", "pear"]) == 0.5


def test_what_is_excluded_takes_its_share_of_what_was_earned():
    assert grade(FRUIT, "plum, pear").correctness == 1.0
    assert grade(FRUIT, "plum, drum, pear").correctness == 0.0
    assert correctness("plum drum", contains_all=["plum", "pear"], excludes=["drum", "axe"]) == 0.25


def test_phrases_match_whole_words_whatever_the_case_and_spacing():
    assert correctness("Use N=k +4.", contains_all=["n = k + 4"]) == 1.0
    assert correctness("often", contains_all=["ten"]) == 0.0
    assert correctness("that makes 12", contains_all=["1"]) == 0.0


def test_one_of_contains_any_is_enough():
    assert correctness("ahoy there", contains_any=["ahoy", "yoho"]) == 1.0
    assert correctness("hello there", contains_any=["ahoy", "yoho"]) == 0.0


def test_equals_any_wants_nothing_else_but_end_punctuation():
    assert correctness(" Plum! ", equals_any=["plum", "pear"]) == 1.0
    assert correctness("a plum", equals_any=["plum", "pear"]) == 0.0


def test_ordered_phrases_come_one_after_the_other():
    assert correctness("cork, oil, lead", ordered=["cork", "oil", "lead"]) == 1.0
    assert correctness("oil cork", ordered=["oil", "cork"]) == 1.0
    assert correctness("oil, cork, lead", ordered=["cork", "oil", "lead"]) == 0.0
    assert correctness("cork", ordered=["cork", "cork"]) == 0.0


def test_two_kinds_of_requirement_count_equally():
    assert correctness("ahoy", contains_all=["ann"], contains_any=["ahoy", "yoho"]) == 0.5


def test_brevity_falls_with_the_words_beyond_the_limit():
    assert grade(FRUIT, "one two three four").brevity == 1.0
    assert grade(FRUIT, "one two three four five six seven eight").brevity == 0.5


@pytest.mark.parametrize(
    ("answer", "style"),
    [
        ("Sure! It is tin. Hope that helps!", 0.5 * 1.0 + 0.3 + 0.2),
        ("Sure! It is tin.", 0.5 * 0.9 + 0.3 + 0.2),
        ("It is tin.", 0.5 * 0.2 + 0.3 + 0.2),
        ("it is tin", 0.5 * 0.2 + 0.3 + 0.0),
        ("It is tin", 0.5 * 0.2 + 0.3 + 0.1),
        ("Duh, it is tin.", 0.0 + 0.3 + 0.2),
        ("Sure, it is obviously tin.", 0.0 + 0.3 + 0.2),
        ("Well, um, it is tin.", 0.5 * 0.2 + 0.3 / 3 + 0.2),
    ],
)
def test_style_is_manners_plainness_and_form(answer: str, style: float):
    assert grade(Checks(contains_all=("tin",)), answer).style == pytest.approx(style)


def test_more_than_two_kind_phrases_earn_no_more():
    checks = Checks(contains_all=("tin",))
    two = grade(checks, "Sure, gladly: tin.").style
    assert grade(checks, "Sure, gladly, of course, please, thanks: tin.").style == two


def test_a_cut_answer_loses_brevity_and_half_its_style():
    whole, cut = grade(FRUIT, "Sure! Plum."), grade(FRUIT, "Sure! Plum.", finished=False)
    assert cut == (whole.correctness, whole.style / 2, 0.0)


@pytest.mark.parametrize(
    ("checks", "message"),
    [
        ({"contains_al": ["tin"]}, "contains_al"),
        ({}, "no requirement"),
        ({"max_words": 3}, "no requirement"),
        ({"contains_all": [" "]}, "blank phrase"),
        ({"contains_all": [3]}, "contains_all.0"),
        ({"contains_all": "tin"}, "contains_all"),
        ({"contains_all": ["tin"], "max_words": 0}, "max_words"),
    ],
)
def test_bad_checks_are_refused_by_name(checks: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Checks.model_validate(checks)


@given(answer=st.text(max_size=60), finished=st.booleans())
def test_every_part_of_any_answer_is_a_share(answer: str, finished: bool):
    result = grade(FRUIT, answer, finished=finished)
    assert all(0.0 <= part <= 1.0 for part in (*result, result.total))
