"""The audit finds a biased judge and leaves a fair one alone."""

import random

import pytest

from starling.data.records import Message, Prompt, RankedAnswer
from starling.feedback.audit import Outcome, audit, chi_square, critical_99
from starling.feedback.candidates import AnswerSet
from starling.judging.judge import Comparison, Ranking, Unparsed
from starling.judging.llm_judge import LlmJudge
from starling.judging.recorded import CallStats
from starling.judging.rubric_responder import RubricResponder


def given(text, model, finish_reason):
    return RankedAnswer(answer=text, model=model, finish_reason=finish_reason)


def answer_set(id, answers, *, failures=(), empty=0, merged=0):
    prompt = Prompt(messages=(Message(role="user", content="?"),), id=id)
    return AnswerSet(prompt, tuple(answers), failures, empty, merged)


def outcome(id, texts, ranks, *, presented=None, good_natured=True, models=None):
    models = models or [f"m{n}" for n in range(len(texts))]
    answers = [given(text, model, "stop") for text, model in zip(texts, models, strict=True)]
    shown = presented or tuple(range(len(texts)))
    verdict = Ranking(id, ranks, shown, good_natured, "")
    return Outcome(answer_set(id, answers), verdict)


def report(outcomes, calls=None):
    return audit(outcomes, calls or {}, num_duplicates=2, seed=0)


def test_chi_square_is_pearsons():
    # (10-20)^2/20 + (20-20)^2/20 + (30-20)^2/20 = 5 + 0 + 5
    assert chi_square([10, 20, 30]) == pytest.approx(10.0)
    assert chi_square([7, 7, 7, 7]) == 0.0


@pytest.mark.parametrize(
    # From the printed tables of the chi-square distribution, upper 1 %.
    ("degrees", "tabled"),
    [(1, 6.635), (2, 9.210), (3, 11.345), (6, 16.812), (10, 23.209), (25, 44.314)],
)
def test_the_critical_value_is_the_tables_to_a_hundredth_of_itself(degrees, tabled):
    assert critical_99(degrees) == pytest.approx(tabled, rel=0.01)


def judged(*, position_bias, noise=0.3, n=300):
    """What a rubric judge makes of four equally good answers, n times."""
    texts = ("It is 4.", "It is  4.", " It is 4.", "It is 4. ")
    judge = LlmJudge(
        RubricResponder(1, noise, position_bias), seed=1, max_tokens=9, temperature=0.0
    )
    messages = (Message(role="user", content="?"),)
    comparisons = [Comparison(f"q{i}", messages, texts, {"contains_any": ["4"]}) for i in range(n)]
    answers = [given(text, f"m{k}", "stop") for k, text in enumerate(texts)]
    return [Outcome(answer_set(v.id, answers), v) for v in judge.rank(comparisons)]


def test_a_judge_that_prefers_the_first_position_is_found_out():
    [table] = report(judged(position_bias=0.4))["positions"]
    assert table["k"] == 4
    assert table["rankings"] == 300
    assert table["is_biased"]
    assert table["chi_square"] > table["critical_99"]
    assert table["winner_share"][0] > table["winner_share"][3]
    assert table["mean_rank"] == sorted(table["mean_rank"])


def test_a_fair_judge_is_not_accused():
    [table] = report(judged(position_bias=0.0))["positions"]
    assert not table["is_biased"]
    assert sum(table["winner_share"]) == pytest.approx(1.0)
    assert all(rank == pytest.approx(2.5, abs=0.35) for rank in table["mean_rank"])


def test_positions_are_those_shown_and_each_number_of_answers_has_its_table():
    outcomes = [
        # Answer 1 won and stood first; then answer 0 won and stood last.
        outcome("a", ["x", "y"], (2, 1), presented=(1, 0)),
        outcome("b", ["x", "y"], (1, 2), presented=(1, 0)),
        outcome("c", ["x", "y", "z"], (3, 1, 2), presented=(2, 0, 1)),
    ]
    two, three = report(outcomes)["positions"]
    assert (two["k"], two["winner_share"], two["mean_rank"]) == (2, [0.5, 0.5], [1.5, 1.5])
    assert (three["k"], three["winner_share"]) == (3, [0.0, 0.0, 1.0])
    assert three["mean_rank"] == [2.0, 3.0, 1.0]


def test_length_counts_pairs_of_different_rank_and_length():
    # Lengths 1, 2, 2, 4; ranks 2, 1, 3, 3.  Pairs: (1,2) longer wins; (1,2') shorter wins;
    # (1,4) shorter wins; (2,2') equally long; (2,4) shorter wins; (2',4) tied.
    found = report([outcome("a", ["w", "xx", "yy", "zzzz"], (2, 1, 3, 3))])["length"]
    assert found["longer_wins"]["mean"] == pytest.approx(1 / 4)
    assert found["longer_wins"]["n"] == 4
    assert found["equally_long_pairs"] == 1
    assert found["tied_pairs"] == 1


def test_mean_rank_by_model_counts_every_answer_of_the_model():
    outcomes = [
        outcome("a", ["x", "yy", "zzz"], (1, 2, 3), models=["old", "new", "new"]),
        outcome("b", ["x", "yy"], (2, 1), models=["old", "new"]),
    ]
    models = report(outcomes)["models"]
    assert list(models) == ["new", "old"]
    assert models["new"]["mean_rank"]["mean"] == pytest.approx((2 + 3 + 1) / 3)
    assert models["new"]["mean_rank"]["n"] == 3
    assert models["old"]["mean_rank"]["mean"] == pytest.approx(1.5)


def test_good_nature_says_how_many_verdicts_did_not_tell():
    outcomes = [
        outcome(str(n), ["x", "y"], (1, 2), good_natured=nature)
        for n, nature in enumerate([True, True, False, None])
    ]
    nature = report(outcomes)["good_natured"]
    assert nature["mean"] == pytest.approx(2 / 3)
    assert (nature["n"], nature["num_failed"]) == (3, 1)


def test_everything_that_was_left_out_is_counted():
    cut = given("x", "m", "length")
    outcomes = [
        outcome("a", ["x", "y"], (1, 2)),
        Outcome(answer_set("b", [cut, cut], merged=1, empty=1), Unparsed("b", "no ranking", "?")),
        Outcome(answer_set("c", [cut], failures=("m: gone",)), None),
        Outcome(answer_set("d", [cut], merged=2), None),
    ]
    found = report(outcomes, {"judge": CallStats(from_ledger=3, new=1, unknown=2, failed=1)})
    assert (found["prompts"], found["duplicate_prompts"], found["rankings"]) == (4, 2, 1)
    assert found["unparsed"] == 1
    assert found["unparsed_examples"] == [{"id": "b", "reason": "no ranking"}]
    assert found["too_few_answers"] == {"after_failures": 1, "alike": 1}
    assert found["answers"] == {
        "distinct": 6,
        "merged": 3,
        "failed": 1,
        "empty": 1,
        "truncated": 4,
    }
    # What depends on interruptions does not stand in results.
    assert found["calls"]["judge"] == {
        "answered": 4,
        "failed": 1,
        "prompt_tokens": 0,
        "response_tokens": 0,
    }


def test_an_audit_is_the_same_again():
    rng = random.Random(0)
    outcomes = [
        outcome(str(n), ["x", "yy", "zzz"], tuple(rng.sample([1, 2, 3], 3))) for n in range(50)
    ]
    assert report(outcomes) == report(outcomes)


def test_an_audit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="ranking"):
        report([Outcome(answer_set("a", []), None)])
