"""A judge made of any responder: prompt text out, replies in prose back, a parser's verdict.

The same path serves an endpoint, a local model and the demo's rubric, so what the demo shows about
shuffling, parsing and bias holds for a real judge.  Which calls make a ranking is the strategy's
matter.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from starling.base.seeding import derive_seed
from starling.data.records import Message
from starling.judging.fences import own_words
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Rating, Unparsed, Vote
from starling.judging.kwise import parse_good_natured, parse_ranking
from starling.judging.rating import parse_rating
from starling.judging.recorded import Recorded
from starling.judging.strategies import KWISE, Question, Strategy, rating_question
from starling.models.interfaces import Failure, Reply, Request, Responder, Sampling

CHARACTERS_PER_TOKEN = 4
"""Where nobody counts.  Source: Nectar's rating script estimates lengths so."""


class LlmJudge(AbstractContextManager["LlmJudge"]):
    """Asks `responder`; what cannot be read is `Unparsed`, never a number.

    A request's `subject` is the question with its answers in the order shown.  A question that
    leaves less than `max_tokens` of `context_length` is not asked; `count_tokens` counts it, else
    its length is estimated.  As a context manager it closes the responder, where that can be closed
    (a recording).
    """

    def __init__(
        self,
        responder: Responder,
        *,
        seed: int,
        max_tokens: int,
        temperature: float,
        strategy: Strategy = KWISE,
        context_length: int | None = None,
        count_tokens: Callable[[tuple[Message, ...]], int] | None = None,
    ) -> None:
        self.responder = responder
        self._seed = seed
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._strategy = strategy
        self._context_length = context_length
        self._count_tokens = count_tokens

    def rank(self, comparisons: Iterable[Comparison]) -> Iterator[Ranking | Unparsed]:
        """Rank each comparison's answers; ValueError when two of one call share an id."""
        comparisons = list(comparisons)
        _refuse_repeated([comparison.id for comparison in comparisons])
        asked = [self._strategy.ask(comparison, self._seed) for comparison in comparisons]
        votes = self._ask("rank", [question for questions in asked for question in questions])
        for comparison, questions in zip(comparisons, asked, strict=True):
            yield self._strategy.conclude(comparison, tuple(next(votes) for _ in questions))
        assert next(votes, None) is None

    def rate(self, answers: Iterable[GradedAnswer]) -> Iterator[Rating | Unparsed]:
        """Rate each answer, in the answers' order.  Raises like `rank`."""
        questions = [rating_question(answer, self._seed) for answer in answers]
        _refuse_repeated([question.id for question in questions])
        for question, vote in zip(questions, self._ask("rate", questions), strict=True):
            if vote.score is None:
                yield Unparsed(question.id, vote.reason or "", vote.text, (vote,))
            else:
                yield Rating(question.id, vote.score, vote.text)

    def __exit__(self, *_error: object) -> None:
        if isinstance(self.responder, Recorded):
            self.responder.close()

    def _ask(self, purpose: str, questions: list[Question]) -> Iterator[Vote]:
        """Every question's vote, in the questions' order, each as soon as those before it are."""
        arrived: dict[str, Reply | Failure] = {}
        requests: list[Request] = []
        for question in questions:
            seed = derive_seed(self._seed, f"judging/{purpose}/{question.key}")
            sampling = Sampling(self._max_tokens, self._temperature, seed)
            if excess := self._excess(question.messages):
                arrived[question.id] = Failure(question.id, excess)
            else:
                subject = question.subject
                requests.append(Request(question.id, question.messages, sampling, subject=subject))
        outcomes = iter(self.responder.respond(requests) if requests else ())
        for question in questions:
            while question.id not in arrived:
                outcome = next(outcomes, None)
                if outcome is None:
                    raise ValueError(f"the responder left {question.id!r} without an outcome")
                arrived[outcome.request_id] = outcome
            yield _read(question, arrived.pop(question.id))
        for outcome in outcomes:
            raise ValueError(f"the responder answered {outcome.request_id!r}, which was not asked")

    def _excess(self, messages: tuple[Message, ...]) -> str | None:
        """Why the model has no room for a question and its reply; None when it has, or may have."""
        if self._context_length is None:
            return None
        if self._count_tokens is None:
            length = sum(len(message.content) for message in messages) // CHARACTERS_PER_TOKEN
        else:
            length = self._count_tokens(messages)
        if length + self._max_tokens <= self._context_length:
            return None
        about = "about " if self._count_tokens is None else ""
        return (
            f"it was not asked, because the question has {about}{length} tokens and the reply may "
            f"have {self._max_tokens}, more than the model's {self._context_length} in all"
        )


def _refuse_repeated(ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        repeated = next(id for id in ids if ids.count(id) > 1)
        raise ValueError(f"two questions of one call share the id {repeated!r}")


def _read(question: Question, outcome: Reply | Failure) -> Vote:
    """The vote of one outcome, whatever it came to."""
    presented = question.presented
    if isinstance(outcome, Failure):
        return Vote(presented, "", reason=f"the judge did not answer: {outcome.reason}")
    ranks = score = good_natured = reason = None
    said = own_words(outcome.text, question.messages[-1].content)
    if isinstance(question.subject, GradedAnswer):
        score = parse_rating(said)
        reason = "it holds no rating from 1 to 10" if score is None else None
    else:
        good_natured = parse_good_natured(said)
        order = parse_ranking(said, len(presented))
        if isinstance(order, Unparsed):
            reason = order.reason
        else:
            ranks = tuple(order.index(place) + 1 for place in range(len(presented)))
    if reason and outcome.finish_reason == "length":
        reason = f"the reply was cut after {outcome.usage.response_tokens} tokens, and {reason}"
    elif reason:
        reason = f"the reply could not be read: {reason}"
    return Vote(
        presented,
        outcome.text,
        ranks,
        score,
        good_natured,
        reason,
        outcome.usage,
        outcome.seconds,
        outcome.usd,
    )
