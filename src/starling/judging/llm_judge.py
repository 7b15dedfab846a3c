"""A judge made of any responder: prompt text out, reply in prose back, a parser's verdict.

The same path serves an endpoint, a local model and the demo's rubric, so what the demo shows about
shuffling, parsing and bias holds for a real judge.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from starling.base.seeding import derive_seed
from starling.data.records import Message
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Rating, Unparsed
from starling.judging.kwise import Presented, parse_good_natured, parse_ranking, present, unshuffle
from starling.judging.rating import parse_rating, rating_messages
from starling.judging.recorded import Recorded
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling


class LlmJudge(AbstractContextManager["LlmJudge"]):
    """Asks `responder`, once per question; what cannot be read is `Unparsed`, never a number.

    A request's `subject` is the question with its answers in the order shown.  As a context manager
    it closes the responder, where that can be closed (a recording).
    """

    def __init__(
        self, responder: Responder, *, seed: int, max_tokens: int, temperature: float
    ) -> None:
        self.responder = responder
        self._seed = seed
        self._max_tokens = max_tokens
        self._temperature = temperature

    def rank(self, comparisons: Iterable[Comparison]) -> Iterator[Ranking | Unparsed]:
        """Rank each comparison's answers; ValueError when two of one call share an id."""
        questions = [present(comparison, self._seed) for comparison in comparisons]
        requests = [
            self._request("rank", question.messages, question.shown) for question in questions
        ]
        for question, outcome in zip(questions, self._ask(requests), strict=True):
            yield _read_ranking(question, outcome)

    def rate(self, answers: Iterable[GradedAnswer]) -> Iterator[Rating | Unparsed]:
        """Rate each answer, in the answers' order.  Raises like `rank`."""
        requests = [
            self._request("rate", rating_messages(answer, self._seed), answer) for answer in answers
        ]
        yield from map(_read_rating, self._ask(requests))

    def __exit__(self, *_error: object) -> None:
        if isinstance(self.responder, Recorded):
            self.responder.close()

    def _request(self, purpose: str, messages: tuple[Message, ...], subject: Any) -> Request:
        seed = derive_seed(self._seed, f"judging/{purpose}/{subject.id}")
        sampling = Sampling(self._max_tokens, self._temperature, seed)
        return Request(subject.id, messages, sampling, subject=subject)

    def _ask(self, requests: list[Request]) -> Iterator[Reply | Failure]:
        """Every request's outcome, in the requests' order."""
        ids = [request.id for request in requests]
        if len(set(ids)) < len(ids):
            repeated = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"two questions of one call share the id {repeated!r}")
        outcomes = {each.request_id: each for each in self.responder.respond(requests)}
        for id in ids:
            if id not in outcomes:
                raise ValueError(f"the responder left {id!r} without an outcome")
            yield outcomes[id]


def _read_ranking(question: Presented, outcome: Reply | Failure) -> Ranking | Unparsed:
    if isinstance(outcome, Failure):
        return _unanswered(outcome)
    order = parse_ranking(outcome.text, len(question.presented))
    if isinstance(order, Unparsed):
        return _unread(outcome, order.reason)
    return Ranking(
        id=outcome.request_id,
        ranks=unshuffle(order, question.presented),
        presented=question.presented,
        good_natured=parse_good_natured(outcome.text),
        text=outcome.text,
    )


def _read_rating(outcome: Reply | Failure) -> Rating | Unparsed:
    if isinstance(outcome, Failure):
        return _unanswered(outcome)
    score = parse_rating(outcome.text)
    if score is None:
        return _unread(outcome, "it holds no rating from 1 to 10")
    return Rating(outcome.request_id, score, outcome.text)


def _unanswered(failure: Failure) -> Unparsed:
    return Unparsed(failure.request_id, f"the judge did not answer: {failure.reason}", "")


def _unread(reply: Reply, reason: str) -> Unparsed:
    if reply.finish_reason == "length":
        reason = f"the reply was cut after {reply.usage.response_tokens} tokens, and {reason}"
    else:
        reason = f"the reply could not be read: {reason}"
    return Unparsed(reply.request_id, reason, reply.text)
