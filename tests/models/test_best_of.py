"""Best-of-n: of each conversation's answers the one that the reward model scores highest."""

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from starling.base.errors import DataError
from starling.data.records import Message
from starling.models.best_of import best_of
from starling.models.interfaces import Failure, Reply, Request, Sampling, Usage
from starling.models.reward_model import RewardModel

END = "<|end_of_turn|>"


class Scripted:
    """Answers each request with a text of its own, last first; `cut` names those that were cut."""

    identity = "script"
    commits_together = False

    def __init__(self, texts, cut=(), fails=()):
        self.texts, self.cut, self.fails = texts, cut, fails

    def respond(self, requests):
        for request in reversed(list(requests)):
            id = request.id
            if id in self.fails:
                yield Failure(id, "the server is down")
            else:
                reason = "length" if id in self.cut else "stop"
                yield Reply(id, self.texts[id], reason, Usage(1, 1))


def group(question, *ids, mode=None):
    messages = (Message(role="user", content=question),)
    return [Request(id, messages, Sampling(8, seed=n), mode) for n, id in enumerate(ids)]


@pytest.fixture(scope="module")
def theirs(reward_folder):
    tokenizer = AutoTokenizer.from_pretrained(reward_folder)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)

    def score(question, answer, end=END, mode="GPT4 Correct"):
        written = f"{mode} User: {question}{END}{mode} Assistant: {answer}{end}"
        return model(**tokenizer(written, return_tensors="pt")).logits.item()

    return score


@pytest.fixture(scope="module")
def judge(reward_folder):
    return RewardModel.load(str(reward_folder))


ANSWERS = {"a": "yes", "b": "no", "c": "it is", "d": "The answer is", "e": "sum", "f": "yes"}


def test_each_groups_answer_is_the_one_that_transformers_scores_highest(judge, theirs):
    groups = [group("What?", "a", "b", "c"), group("Why?", "d", "e"), group("How?", "f")]
    picked = best_of(groups, Scripted(ANSWERS), judge)
    for requests, reply in zip(groups, picked, strict=True):
        question = requests[0].messages[0].content
        scores = {request.id: theirs(question, ANSWERS[request.id]) for request in requests}
        assert reply.request_id == max(scores, key=scores.__getitem__)
        assert reply.text == ANSWERS[reply.request_id]
    # Neither always the first nor always the last, or the test could not tell.
    places = [
        [request.id for request in requests].index(reply.request_id)
        for requests, reply in zip(groups[:2], picked[:2], strict=True)
    ]
    assert len(set(places)) == 2


def test_of_equal_answers_the_first_is_taken(judge):
    texts = {"a": "yes", "b": "yes", "c": "yes"}
    [reply] = best_of([group("What?", "b", "a", "c")], Scripted(texts), judge)
    assert reply.request_id == "b"


def test_an_answer_that_was_cut_is_scored_without_an_end_marker(judge, theirs):
    whole, cut = theirs("What?", "yes"), theirs("What?", "yes", end="")
    assert whole != cut
    requests = group("What?", "a", "f")
    worse = ("a",) if cut < whole else ("f",)
    [reply] = best_of([requests], Scripted(ANSWERS, cut=worse), judge)
    assert reply.request_id == ("f" if worse == ("a",) else "a")


def test_answers_are_scored_in_the_mode_they_were_asked_in(judge, theirs):
    pairs = [(first, second) for first in "abcde" for second in "abcde" if first < second]

    def prefers(mode, first, second):
        scores = [theirs("What?", ANSWERS[id], mode=mode) for id in (first, second)]
        return first if scores[0] >= scores[1] else second

    # A pair that the mode decides.
    first, second = next(
        pair for pair in pairs if prefers("Code", *pair) != prefers("GPT4 Correct", *pair)
    )
    [reply] = best_of([group("What?", first, second, mode="Code")], Scripted(ANSWERS), judge)
    assert reply.request_id == prefers("Code", first, second)


def test_a_failed_call_is_no_answer(judge):
    with pytest.raises(DataError, match="no answer to b: the server is down"):
        best_of([group("What?", "a", "b")], Scripted(ANSWERS, fails=("b",)), judge)


@pytest.mark.parametrize("groups", [[group("What?", "a"), []], [group("a", "a"), group("b", "a")]])
def test_groups_without_requests_or_with_a_shared_id_are_our_mistake(judge, groups):
    with pytest.raises(ValueError, match="every group needs requests"):
        best_of(groups, Scripted(ANSWERS), judge)
