"""The demo's judge: grades by each prompt's checks and writes what a language model would write.

It stands where GPT-4 stands, with a stated amount of noise and of preference for the first
position, so that its replies go through the same parser and the audit has something to find.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations
from string import ascii_uppercase
from typing import Any

from pydantic import ValidationError

from starling.base.errors import DataError
from starling.base.seeding import python_generator
from starling.judging.judge import Comparison, GradedAnswer
from starling.judging.rating import HIGHEST, LOWEST
from starling.judging.rubric import Checks, grade
from starling.models.interfaces import Reply, Request, Usage


class RubricResponder:
    """Replies from `grade(...).total`, plus noise, plus a bias for early positions.

    `noise` is a standard deviation and `position_bias` the advantage of the first position over the
    last, both on the grade's scale (0 to 1).  The noise is drawn per request id and position, so
    the same question gets the same reply, whatever else is asked.  It counts no tokens.
    """

    commits_together = True

    def __init__(self, seed: int, noise: float, position_bias: float) -> None:
        self.identity = f"rubric seed={seed} noise={noise} position_bias={position_bias}"
        self._seed = seed
        self._noise = noise
        self._position_bias = position_bias

    def respond(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """Yield one reply per request, in order; DataError without checks that can be read."""
        for request in requests:
            match request.subject:
                case Comparison() as comparison:
                    text = self._rank(request.id, comparison)
                case GradedAnswer() as answer:
                    text = self._rate(request.id, answer)
                case other:
                    raise TypeError(f"a rubric grades questions, not {type(other).__name__}")
            yield Reply(request.id, text, "stop", Usage(prompt_tokens=0, response_tokens=0))

    def _rank(self, id: str, shown: Comparison) -> str:
        checks = _read_checks(shown.id, shown.checks)
        last = len(shown.answers) - 1
        finished = shown.finished or (True,) * len(shown.answers)
        merits: dict[str, tuple[float, float]] = {}
        for position, answer in enumerate(shown.answers):
            error, coin = self._draw(id, position)
            bias = self._position_bias * (0.5 - position / last)
            total = grade(checks, answer, finished=finished[position]).total
            # The coin parts equal grades, so that position never does.
            merits[ascii_uppercase[position]] = (total + error + bias, coin)
        order = sorted(merits, key=merits.__getitem__, reverse=True)
        walk = (
            f"{left} and {right}: {min(left, right, key=order.index)} is better."
            for left, right in combinations(merits, 2)
        )
        return "\n".join(["Good-natured: yes", *walk, f"[[{', '.join(map(repr, order))}]]"])

    def _rate(self, id: str, answer: GradedAnswer) -> str:
        checks = _read_checks(answer.id, answer.checks)
        total = grade(checks, answer.answer, finished=answer.finished).total
        noisy = min(1.0, max(0.0, total + self._draw(id, 0)[0]))
        score = round(LOWEST + (HIGHEST - LOWEST) * noisy, 1)
        return f"Graded by the prompt's checks.\n[[{score}]]"

    def _draw(self, id: str, position: int) -> tuple[float, float]:
        """The noise on one grade, and a coin for ties."""
        rng = python_generator(self._seed, f"judging/rubric/{id}", position)
        return rng.gauss(0.0, 1.0) * self._noise, rng.random()


def _read_checks(id: str, checks: dict[str, Any] | None) -> Checks:
    if checks is None:
        raise DataError(
            f"question {id!r} has no checks, so the rubric judge cannot grade its answers. "
            "Add checks to the prompt, or choose a judge that reads text (judge.kind: endpoint)."
        )
    try:
        return Checks.model_validate(checks)
    except ValidationError as error:
        problems = "; ".join(problem["msg"] for problem in error.errors(include_url=False))
        raise DataError(f"the checks of question {id!r} cannot be read: {problems}.") from error
