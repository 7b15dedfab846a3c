"""The demo's judge: right without noise, wrong in the stated way with it."""

import pytest

from starling.base.errors import DataError
from starling.data.records import Message
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Rating
from starling.judging.llm_judge import LlmJudge
from starling.judging.rubric_responder import RubricResponder

CONVERSATION = (Message(role="user", content="What is 2 + 2?"),)
CHECKS = {"contains_any": ["4", "four"], "max_words": 20}
GOOD = "Of course! It is 4. Hope that helps."
PLAIN = "It is 4."
WRONG = "It is 5."
RUDE = "it is 5, obviously, um"


def judge(*, noise=0.0, position_bias=0.0, seed=0):
    responder = RubricResponder(seed, noise, position_bias)
    return LlmJudge(responder, seed=seed, max_tokens=100, temperature=0.0)


def rank(answers, *, n=1, **options):
    comparisons = [Comparison(f"q{i}", CONVERSATION, tuple(answers), CHECKS) for i in range(n)]
    verdicts = list(judge(**options).rank(comparisons))
    assert all(isinstance(verdict, Ranking) for verdict in verdicts)
    return verdicts


def test_without_noise_the_better_answer_ranks_higher():
    [verdict] = rank([WRONG, GOOD, RUDE, PLAIN])
    assert verdict.ranks == (3, 1, 4, 2)
    assert verdict.good_natured is True


def test_a_cut_answer_ranks_below_the_same_answer_finished():
    comparison = Comparison("q", CONVERSATION, (PLAIN, PLAIN + " "), CHECKS, (False, True))
    [verdict] = judge().rank([comparison])
    assert verdict.ranks == (2, 1)


def test_ratings_run_from_one_to_ten_with_one_decimal():
    answers = [
        GradedAnswer(str(n), CONVERSATION, text, CHECKS) for n, text in enumerate((GOOD, RUDE))
    ]
    good, rude = judge().rate(answers)
    assert isinstance(good, Rating)
    assert good.score == 10.0
    assert 1.0 <= rude.score < 5.0
    assert round(rude.score, 1) == rude.score


def test_noise_never_leaves_the_scale():
    answers = [GradedAnswer(str(n), CONVERSATION, GOOD, CHECKS) for n in range(50)]
    scores = [rating.score for rating in judge(noise=3.0).rate(answers)]
    assert min(scores) == 1.0
    assert max(scores) == 10.0


def test_equal_answers_are_ordered_by_a_coin_and_not_by_position():
    firsts = sum(verdict.votes[0].ranks[0] == 1 for verdict in rank([PLAIN, PLAIN], n=400))
    # 200 expected, standard deviation 10: five of them.
    assert 150 < firsts < 250


def test_position_bias_favours_the_first_by_the_stated_amount():
    # Equal grades and no noise: any bias decides every comparison.
    for verdict in rank([PLAIN] * 4, n=20, position_bias=0.001):
        assert verdict.votes[0].ranks == (1, 2, 3, 4)


def test_noise_turns_some_close_comparisons_round_and_the_same_ones_again():
    once = [verdict.ranks for verdict in rank([GOOD, PLAIN], n=200, noise=0.2)]
    assert 10 < sum(ranks == (2, 1) for ranks in once) < 100
    assert [verdict.ranks for verdict in rank([GOOD, PLAIN], n=200, noise=0.2)] == once
    assert [verdict.ranks for verdict in rank([GOOD, PLAIN], n=200, noise=0.2, seed=1)] != once


@pytest.mark.parametrize("checks", [None, {"contains": ["4"]}])
def test_a_question_without_readable_checks_is_refused_by_its_id(checks):
    with pytest.raises(DataError, match="'q7'"):
        list(judge().rank([Comparison("q7", CONVERSATION, (GOOD, PLAIN), checks)]))


def test_the_identity_names_everything_that_changes_a_reply():
    identities = {
        RubricResponder(*arguments).identity
        for arguments in [(0, 0.1, 0.0), (1, 0.1, 0.0), (0, 0.2, 0.0), (0, 0.1, 0.1)]
    }
    assert len(identities) == 4
