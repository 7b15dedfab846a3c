"""A judge made of any responder: prompt text out, reply in prose back, a parser's verdict.

The same path serves an endpoint, a local model and the demo's rubric, so what the demo shows about
shuffling, parsing and bias holds for a real judge.
"""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from starling.base.seeding import derive_seed
from starling.data.records import Message
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Rating, Unparsed
from starling.judging.kwise import (
    Presented,
    parse_good_natured,
    parse_ranking,
    present,
    unshuffle,
)
from starling.judging.rating import parse_rating, rating_messages
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling


class LlmJudge:
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
        """Rank each comparison's answers, in the comparisons' order.

        Raises ValueError when two comparisons of one call share an id.
        """
        questions = [present(comparison, self._seed) for comparison in comparisons]
        requests = [
            self._request("rank", question.messages, question.shown) for question in questions
        ]
        for question, outcome in zip(questions, self._ask(requests), strict=True):
            yield _read_ranking(question, outcome)

    def rate(self, answers: Iterable[GradedAnswer]) -> Iterator[Rating | Unparsed]:
        """Rate each answer, in the answers' order.  Raises like `rank`."""
        questions = list(answers)
        requests = [
            self._request("rate", rating_messages(question, self._seed), question)
            for question in questions
        ]
        for question, outcome in zip(questions, self._ask(requests), strict=True):
            yield _read_rating(question, outcome)

    def close(self) -> None:
        """Close the responder, where it can be closed."""
        close = getattr(self.responder, "close", None)
        if close is not None:
            close()

    def __enter__(self) -> "LlmJudge":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _request(self, purpose: str, messages: tuple[Message, ...], subject: Any) -> Request:
        seed = derive_seed(self._seed, f"judging/{purpose}/{subject.id}")
        sampling = Sampling(self._max_tokens, self._temperature, seed)
        return Request(subject.id, messages, sampling, subject=subject)

    def _ask(self, requests: list[Request]) -> Iterator[Reply | Failure]:
        """Every request's outcome, in the requests' order, each as early as that allows."""
        ids = [request.id for request in requests]
        if len(set(ids)) < len(ids):
            repeated = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"two questions of one call share the id {repeated!r}")
        waiting: dict[str, Reply | Failure] = {}
        position = 0
        for outcome in self.responder.respond(requests):
            waiting[outcome.request_id] = outcome
            while position < len(ids) and ids[position] in waiting:
                yield waiting.pop(ids[position])
                position += 1
        if position < len(ids):
            raise ValueError(f"the responder left {ids[position]!r} without an outcome")


def _read_ranking(question: Presented, outcome: Reply | Failure) -> Ranking | Unparsed:
    id = question.shown.id
    if isinstance(outcome, Failure):
        return Unparsed(id, f"the judge did not answer: {outcome.reason}", "")
    order = parse_ranking(outcome.text, len(question.presented))
    if isinstance(order, Unparsed):
        return _unread(id, order.reason, outcome)
    return Ranking(
        id=id,
        ranks=unshuffle(order, question.presented),
        presented=question.presented,
        good_natured=parse_good_natured(outcome.text),
        text=outcome.text,
        usage=outcome.usage,
    )


def _read_rating(question: GradedAnswer, outcome: Reply | Failure) -> Rating | Unparsed:
    if isinstance(outcome, Failure):
        return Unparsed(question.id, f"the judge did not answer: {outcome.reason}", "")
    score = parse_rating(outcome.text)
    if score is None:
        return _unread(question.id, "it holds no rating from 1 to 10", outcome)
    return Rating(question.id, score, outcome.text, outcome.usage)


def _unread(id: str, reason: str, reply: Reply) -> Unparsed:
    if reply.finish_reason == "length":
        reason = f"the reply was cut after {reply.usage.response_tokens} tokens, and {reason}"
    else:
        reason = f"the reply could not be read: {reason}"
    return Unparsed(id, reason, reply.text)
