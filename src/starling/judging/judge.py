"""What a judge is asked and what it returns: a verdict, or that none could be read.

A verdict is never a number that stands for failure.  Ranks of a `Ranking` are in the order in which
the answers were given, whatever order they were shown in.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from starling.data.records import Message
from starling.models.interfaces import Usage


@dataclass(frozen=True)
class Comparison:
    """K answers to one conversation (which ends with the user's turn), to be ranked."""

    id: str
    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    checks: dict[str, Any] | None = None
    finished: tuple[bool, ...] | None = None
    """Which answers ended by themselves; None when not known."""


@dataclass(frozen=True)
class GradedAnswer:
    """One answer to one conversation, to be rated from 1 to 10."""

    id: str
    messages: tuple[Message, ...]
    answer: str
    checks: dict[str, Any] | None = None
    finished: bool = True


@dataclass(frozen=True)
class Vote:
    """One call of a judge about a comparison: what was shown, what came back, how it was read.

    `presented[p]` is the answer shown at place p, all of them or the ones asked about, and
    `ranks[p]` its rank among these.  `score` is there instead where a single answer was rated.
    """

    presented: tuple[int, ...]
    text: str
    ranks: tuple[int, ...] | None = None
    score: float | None = None
    good_natured: bool | None = None
    reason: str | None = None
    """Why nothing could be read; None where ranks or a score stand."""
    usage: Usage = Usage(0, 0)
    seconds: float | None = None
    usd: float | None = None
    """Latency and price of the call; None where not known."""


@dataclass(frozen=True)
class Ranking:
    """A read verdict: `ranks[i]` is answer i's (1 = best; equal ranks tie), from all `votes`.

    `agreement` is Kendall's W of the votes that ranked every answer; None with fewer than two.
    """

    id: str
    ranks: tuple[int, ...]
    votes: tuple[Vote, ...]
    good_natured: bool | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class Rating:
    """A read rating, 1 (worst) to 10 (best)."""

    id: str
    score: float
    text: str


@dataclass(frozen=True)
class Unparsed:
    """The judge did not answer, or its answers hold no verdict; `reason` says which."""

    id: str
    reason: str
    text: str = ""
    votes: tuple[Vote, ...] = ()


@runtime_checkable
class Judge(Protocol):
    """Ranks and rates; yields one outcome per question, in the questions' order."""

    def rank(self, comparisons: Iterable[Comparison]) -> Iterator[Ranking | Unparsed]:
        """Rank each comparison's answers, best first."""
        ...

    def rate(self, answers: Iterable[GradedAnswer]) -> Iterator[Rating | Unparsed]:
        """Rate each answer from 1 to 10."""
        ...
