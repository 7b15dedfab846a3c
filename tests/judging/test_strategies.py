"""The four ways to a ranking: what is asked, and what votes come to, missing ones included."""

import re
from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from starling.data.records import Message
from starling.judging.judge import Comparison, Ranking, Unparsed
from starling.judging.llm_judge import LlmJudge
from starling.judging.rubric_responder import RubricResponder
from starling.judging.strategies import choose_strategy, num_calls
from starling.models.interfaces import Failure, Reply, Usage

CONVERSATION = (Message(role="user", content="How many?"),)
NAMES = ("kwise", "kwise-repeated", "pairwise", "pointwise")


class Scripted:
    """Answers by a function of the blocks' texts, in the order shown; None fails the call."""

    identity = "scripted"
    commits_together = False

    def __init__(self, answer):
        self._answer = answer
        self.requests = []

    def respond(self, requests):
        requests = list(requests)
        self.requests += requests
        for request in reversed(requests):
            shown = re.findall(
                r"<<answer(?: [A-Z])? [0-9a-f]{8}>>\n(.*?)\n<<end", request.messages[-1].content
            )
            text = self._answer(shown)
            if text is None:
                yield Failure(request.id, "server answered 500")
            else:
                yield Reply(request.id, text, "stop", Usage(10, 5))


def by_number(shown):
    """The highest number is best; a single one is its own rating."""
    if len(shown) == 1:
        return f"[[{shown[0]}]]"
    order = sorted(range(len(shown)), key=lambda place: -int(shown[place]))
    return f"Good-natured: yes\n[[{', '.join('ABCDEFG'[place] for place in order)}]]"


def first_is_best(shown):
    return f"[[{', '.join('ABCDEFG'[: len(shown)])}]]"


def rank(name, answer, answers, *, repeats=3, seed=5, id="q"):
    responder = Scripted(answer)
    strategy = choose_strategy(name, repeats)
    judge = LlmJudge(responder, seed=seed, max_tokens=100, temperature=0.7, strategy=strategy)
    [verdict] = judge.rank([Comparison(id, CONVERSATION, tuple(answers))])
    return verdict, responder.requests


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quality", list(permutations("2468")))
def test_a_judge_that_is_right_is_read_right_by_every_strategy(name, quality):
    verdict, _ = rank(name, by_number, quality)
    assert isinstance(verdict, Ranking)
    # 8 is best, so its rank is 1; 2 is worst, so its rank is 4.
    assert verdict.ranks == tuple(5 - int(number) // 2 for number in quality)
    assert verdict.good_natured is (None if name == "pointwise" else True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [2, 5])
def test_calls_are_as_many_as_announced_each_with_its_own_id_and_seed(name, k):
    # Two answers have two orders: three calls would show one of them twice.
    repeated = 4 if k == 2 else 3
    calls = {"kwise": 1, "kwise-repeated": repeated, "pairwise": k * (k - 1), "pointwise": k}[name]
    assert num_calls(name, 3, k) == calls
    verdict, requests = rank(name, by_number, "23456"[:k])
    assert len(requests) == len(verdict.votes) == calls
    assert len({request.id for request in requests}) == calls
    assert len({request.sampling.seed for request in requests}) == calls
    _, again = rank(name, by_number, "23456"[:k])
    assert again == requests


def test_the_single_call_has_the_comparisons_own_id():
    _, requests = rank("kwise", by_number, "123")
    assert [request.id for request in requests] == ["q"]


def test_ids_that_look_like_calls_of_another_do_not_collide():
    responder = Scripted(by_number)
    judge = LlmJudge(
        responder,
        seed=0,
        max_tokens=9,
        temperature=0.0,
        strategy=choose_strategy("kwise-repeated", 3),
    )
    comparisons = [Comparison(id, CONVERSATION, ("1", "2")) for id in ("q", "q/0", "q/1", "q/1/0")]
    assert all(isinstance(verdict, Ranking) for verdict in judge.rank(comparisons))


def test_going_from_one_call_to_several_buys_only_the_others():
    _, [single] = rank("kwise", by_number, "12345")
    _, repeated = rank("kwise-repeated", by_number, "12345")
    same = [
        request
        for request in repeated
        if (request.messages, request.sampling) == (single.messages, single.sampling)
    ]
    assert len(same) == 1


@pytest.mark.parametrize(
    ("k", "repeats"), [(7, 3), (7, 7), (7, 2), (3, 3), (2, 3), (2, 4), (5, 12)]
)
def test_repeats_show_every_answer_at_places_far_apart(k, repeats):
    verdict, _ = rank("kwise-repeated", by_number, "1234567"[:k], repeats=repeats)
    orders = [vote.presented for vote in verdict.votes]
    assert len(orders) == (repeats if repeats < k else num_calls("kwise-repeated", repeats, k))
    for start in range(0, len(orders), k):
        # A Latin square: nobody stands twice at one place.
        block = orders[start : start + k]
        for place in range(k):
            assert len({order[place] for order in block}) == len(block)
    if repeats < k:
        places = [[order.index(answer) for order in orders] for answer in range(k)]
        assert all(max(each) - min(each) >= k // 2 for each in places)


def test_repeats_walk_the_pairs_in_another_order():
    _, requests = rank("kwise-repeated", by_number, "1234567", repeats=4)
    walks = {
        tuple(re.findall(r"^([A-G]) and ([A-G])$", request.messages[-1].content, re.MULTILINE))
        for request in requests
    }
    assert len(walks) == 4
    assert {len(walk) for walk in walks} == {21}


def test_a_judge_of_places_alone_ends_in_a_tie_where_every_place_was_everyones():
    for name, repeats, k in (
        ("pairwise", 3, 4),
        ("kwise-repeated", 4, 4),
        ("kwise-repeated", 3, 2),
        ("kwise-repeated", 5, 4),
    ):
        verdict, _ = rank(name, first_is_best, "1234"[:k], repeats=repeats)
        assert verdict.ranks == (1,) * k


@pytest.mark.parametrize(
    ("repeats", "k", "calls"), [(3, 7, 3), (7, 7, 7), (8, 7, 14), (3, 2, 4), (2, 2, 2), (12, 5, 15)]
)
def test_more_repeats_than_answers_are_whole_turns(repeats, k, calls):
    assert num_calls("kwise-repeated", repeats, k) == calls


def test_every_pair_is_shown_in_both_orders():
    verdict, _ = rank("pairwise", by_number, "1234")
    assert Counter(vote.presented for vote in verdict.votes) == Counter(permutations(range(4), 2))


@given(st.lists(st.integers(1, 10), min_size=2, max_size=7))
def test_ratings_rank_by_themselves_and_equal_ones_tie(scores):
    verdict, _ = rank("pointwise", by_number, [str(score) for score in scores])
    expected = stats.rankdata([-score for score in scores], method="dense")
    assert verdict.ranks == tuple(expected)
    assert [vote.score for vote in verdict.votes] == scores
    assert [vote.presented for vote in verdict.votes] == [(n,) for n in range(len(scores))]


def test_agreement_is_of_the_votes_that_could_be_read():
    verdict, _ = rank("kwise-repeated", by_number, "12345")
    assert verdict.agreement == 1
    verdict, _ = rank("kwise-repeated", first_is_best, "12345", repeats=5)
    # Every answer has every rank once: the sums of ranks are all alike.
    assert verdict.agreement == 0
    assert rank("pairwise", by_number, "123")[0].agreement is None
    assert rank("kwise", by_number, "123")[0].agreement is None


@pytest.mark.parametrize("said", [None, "They are all fine."])
def test_repeats_rank_by_the_votes_that_could_be_read_and_keep_the_others(said):
    calls = iter([said, said])
    verdict, _ = rank("kwise-repeated", lambda shown: next(calls, by_number(shown)), "213")
    assert isinstance(verdict, Ranking)
    assert verdict.ranks == (2, 3, 1)
    assert verdict.agreement is None
    assert [vote.reason is None for vote in verdict.votes].count(False) == 2
    assert [vote.ranks is None for vote in verdict.votes].count(True) == 2


@pytest.mark.parametrize("name", NAMES)
def test_without_any_vote_there_is_no_ranking_whatever_the_strategy(name):
    verdict, _ = rank(name, lambda shown: None, "213")
    assert isinstance(verdict, Unparsed)
    assert "server answered 500" in verdict.reason
    count = num_calls(name, 3, 3)
    assert len(verdict.votes) == count
    assert (f"{count} of {count} votes" in verdict.reason) is (count > 1)


def test_a_missing_rating_leaves_no_ranking():
    verdict, _ = rank(
        "pointwise", lambda shown: None if shown == ["2"] else by_number(shown), "123"
    )
    assert isinstance(verdict, Unparsed)
    assert "1 of 3 votes" in verdict.reason
    assert [vote.score for vote in verdict.votes] == [1, None, 3]


def test_a_pair_counts_only_where_both_orders_were_read():
    # 1 is read above 3, but not the other way round; every other pair is read.
    def unread(shown):
        return (
            None if shown == ["3", "1"] else "[[A, B]]" if shown == ["1", "3"] else by_number(shown)
        )

    verdict, _ = rank("pairwise", unread, "123")
    assert isinstance(verdict, Ranking)
    assert verdict.ranks == (3, 2, 1)


@pytest.mark.parametrize("lost", ["1", "12"])
def test_pairs_that_leave_an_answer_or_a_group_apart_are_no_ranking(lost):
    def apart(shown):
        return by_number(shown) if (shown[0] in lost) == (shown[1] in lost) else None

    verdict, _ = rank("pairwise", apart, "1234")
    assert isinstance(verdict, Unparsed)
    assert "do not connect all 4 answers" in verdict.reason


def test_a_chain_of_pairs_is_enough():
    verdict, _ = rank(
        "pairwise",
        lambda shown: by_number(shown) if abs(int(shown[0]) - int(shown[1])) == 1 else None,
        "2431",
    )
    assert isinstance(verdict, Ranking)
    assert verdict.ranks == (3, 1, 2, 4)


def test_pairwise_makes_no_tie_of_two_that_were_never_compared():
    def star(shown):
        return by_number(shown) if "9" in shown else None

    verdict, _ = rank("pairwise", star, "1923")
    assert isinstance(verdict, Unparsed)
    assert "answers 1 and 3, not compared, come out equal" in verdict.reason
    assert "6 of 12 votes" in verdict.reason


def test_pairwise_ties_two_that_were_compared_though_others_were_not():
    # 1 and 2 change with the order, and both beat 3; of 4, which beats 3 too, they are not told.
    def answer(shown):
        if {"1", "2"} == set(shown):
            return first_is_best(shown)
        return None if set(shown) in ({"1", "4"}, {"2", "4"}) else by_number(shown)

    verdict, _ = rank("pairwise", answer, "1243")
    assert isinstance(verdict, Ranking)
    assert verdict.ranks == (3, 3, 1, 2)


@pytest.mark.parametrize(
    ("said", "expected"),
    [("yes yes no", True), ("no yes no", False), ("yes no -", None), ("- - -", None)],
)
def test_good_nature_is_what_most_votes_say(said, expected):
    words = iter(said.split())

    def answer(shown):
        word = next(words)
        return by_number(shown).replace("yes", word) if word != "-" else first_is_best(shown)

    assert rank("kwise-repeated", answer, "123")[0].good_natured is expected


@pytest.mark.parametrize("name", NAMES)
def test_the_rubric_judge_answers_every_strategy(name):
    checks = {"contains_any": ["4"], "max_words": 20}
    answers = ("It is 5.", "It is 4.", "Of course! It is 4. Hope that helps.")
    judge = LlmJudge(
        RubricResponder(0, 0.0, 0.0),
        seed=0,
        max_tokens=100,
        temperature=0.0,
        strategy=choose_strategy(name, 3),
    )
    finished = (True, True, False)
    [verdict] = judge.rank([Comparison("q", CONVERSATION, answers, checks, finished)])
    assert verdict.ranks[1] == 1
    assert max(verdict.ranks) == 3
