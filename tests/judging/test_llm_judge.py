"""A judge asked through text: nothing is lost between the shuffled question and the ranks."""

import re
from itertools import permutations

import pytest

from starling.data.records import Message
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Rating, Unparsed
from starling.judging.llm_judge import LlmJudge
from starling.models.interfaces import Failure, Reply, Usage

CONVERSATION = (Message(role="user", content="How many?"),)


class Scripted:
    """Reads the request's text alone, as a real judge must, and answers by a function of it."""

    identity = "scripted"
    commits_together = False

    def __init__(self, answer, *, backwards=False):
        self._answer = answer
        self._backwards = backwards
        self.requests = []

    def respond(self, requests):
        requests = list(requests)
        self.requests += requests
        for request in reversed(requests) if self._backwards else requests:
            said = self._answer(request)
            if isinstance(said, str):
                said = Reply(request.id, said, "stop", Usage(10, 5))
            yield said


def judge(responder):
    return LlmJudge(responder, seed=5, max_tokens=100, temperature=0.0)


def rank_by_number(request):
    """Order the answers shown by the number each holds, highest first."""
    shown = re.findall(r"<<answer ([A-Z]) [0-9a-f]{8}>>\n(\d+)\n", request.messages[-1].content)
    order = sorted(shown, key=lambda pair: -int(pair[1]))
    return f"Good-natured: yes\n[[{', '.join(label for label, _ in order)}]]"


@pytest.mark.parametrize("quality", list(permutations([10, 20, 30, 40])))
def test_the_verdict_survives_shuffling_for_every_order_of_four(quality):
    comparison = Comparison("-".join(map(str, quality)), CONVERSATION, tuple(map(str, quality)))
    [verdict] = judge(Scripted(rank_by_number)).rank([comparison])
    assert isinstance(verdict, Ranking)
    # 40 is best, so its rank is 1; 10 is worst, so its rank is 4.
    assert verdict.ranks == tuple(5 - number // 10 for number in quality)
    assert verdict.good_natured is True


def test_presented_says_which_answer_stood_where():
    responder = Scripted(rank_by_number)
    answers = ("10", "20", "30", "40", "50")
    [verdict] = judge(responder).rank([Comparison("q", CONVERSATION, answers)])
    task = responder.requests[0].messages[-1].content
    shown = re.findall(r"<<answer [A-Z] [0-9a-f]{8}>>\n(\d+)\n", task)
    assert isinstance(verdict, Ranking)
    assert [answers[index] for index in verdict.presented] == shown
    assert responder.requests[0].subject.answers == tuple(shown)


def test_verdicts_come_in_the_questions_order_whatever_the_replies_order():
    comparisons = [Comparison(f"q{n}", CONVERSATION, ("10", "20")) for n in range(5)]
    verdicts = list(judge(Scripted(rank_by_number, backwards=True)).rank(comparisons))
    assert [verdict.id for verdict in verdicts] == ["q0", "q1", "q2", "q3", "q4"]


def test_a_failed_call_is_unparsed_with_its_reason():
    responder = Scripted(lambda request: Failure(request.id, "server answered 500"))
    [verdict] = judge(responder).rank([Comparison("q", CONVERSATION, ("10", "20"))])
    assert isinstance(verdict, Unparsed)
    assert verdict.id == "q"
    assert "server answered 500" in verdict.reason


def test_a_reply_without_a_verdict_is_unparsed_and_keeps_its_text():
    [verdict] = judge(Scripted(lambda request: "Both are nice.")).rank(
        [Comparison("q", CONVERSATION, ("10", "20"))]
    )
    assert isinstance(verdict, Unparsed)
    assert verdict.text == "Both are nice."
    assert "cut" not in verdict.reason


@pytest.mark.parametrize("kind", ["rank", "rate"])
def test_a_cut_reply_without_a_verdict_says_that_it_was_cut(kind):
    asked = judge(
        Scripted(lambda request: Reply(request.id, "A and B: A", "length", Usage(9, 100)))
    )
    if kind == "rank":
        [verdict] = asked.rank([Comparison("q", CONVERSATION, ("10", "20"))])
    else:
        [verdict] = asked.rate([GradedAnswer("q", CONVERSATION, "10")])
    assert isinstance(verdict, Unparsed)
    assert "cut after 100 tokens" in verdict.reason


def test_a_cut_reply_with_a_full_verdict_counts():
    asked = judge(
        Scripted(lambda request: Reply(request.id, "[['B', 'A']]", "length", Usage(9, 9)))
    )
    [verdict] = asked.rank([Comparison("q", CONVERSATION, ("10", "20"))])
    assert isinstance(verdict, Ranking)


def test_ratings_are_read_and_those_off_the_scale_are_unparsed():
    replies = {"a": "[[7.5]]", "b": "[[70]]"}
    answers = [GradedAnswer(id, CONVERSATION, "10") for id in replies]
    first, second = judge(Scripted(lambda request: replies[request.id])).rate(answers)
    assert first == Rating("a", 7.5, "[[7.5]]")
    assert isinstance(second, Unparsed)


def test_two_questions_of_one_id_are_refused():
    comparisons = [Comparison("q", CONVERSATION, ("10", "20"))] * 2
    with pytest.raises(ValueError, match="'q'"):
        list(judge(Scripted(rank_by_number)).rank(comparisons))


def test_a_responder_that_leaves_a_question_out_is_noticed():
    class Silent(Scripted):
        def respond(self, requests):
            return iter([*super().respond(requests)][:-1])

    comparisons = [Comparison(f"q{n}", CONVERSATION, ("10", "20")) for n in range(2)]
    with pytest.raises(ValueError, match="'q1'"):
        list(judge(Silent(rank_by_number)).rank(comparisons))


def test_each_question_has_its_own_seed_and_the_same_one_again():
    responder = Scripted(rank_by_number)
    comparisons = [Comparison(f"q{n}", CONVERSATION, ("10", "20")) for n in range(3)]
    list(judge(responder).rank(comparisons))
    list(judge(responder).rank(comparisons))
    seeds = [request.sampling.seed for request in responder.requests]
    assert len(set(seeds)) == 3
    assert seeds[:3] == seeds[3:]
