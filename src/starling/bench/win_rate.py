"""The share of prompts on which a judge prefers a model's answer to a baseline's.

Ordinary: both answers are shown in both seats; a win in both is a win, and a tie, or two seats that
disagree, is half of one.  Weighted, as in AlpacaEval 2: the probability that the judge gives to the
model's answer, read from one token.  A comparison that has no verdict in either seat has failed: it
is reported, and not counted.  Intervals are by bootstrap over prompts.
"""

import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from starling.base.estimate import Estimate, clustered_mean
from starling.bench.asking import Unread, ask
from starling.bench.results import Line
from starling.judging.config import JudgeSection
from starling.judging.judge import Comparison, Judge, Ranking, Unparsed, Vote
from starling.judging.preference import ONE_TOKEN, ask_preference, second_share
from starling.models.interfaces import Reply, Responder

Figures = dict[str, Any]


class Outcome(NamedTuple):
    """What came of one comparison of (baseline's, model's) answers: the model's win, 0 to 1.

    `by_call` has it for each call that was read, and `model_first` who stood first there.  Without
    a verdict `win` is None, and `reason` says why.
    """

    win: float | None
    by_call: tuple[float, ...] = ()
    model_first: tuple[bool, ...] = ()
    reason: str | None = None


SAME = Outcome(0.5)
"""The same answer twice needs no judge."""


def both_seats(section: JudgeSection) -> JudgeSection:
    """The judge who is shown two answers in both orders; the logits judge does that anyway."""
    if section.kind == "logits":
        return section
    return section.model_copy(update={"strategy": "pairwise"})


def compare(comparisons: Sequence[Comparison], judge: Judge) -> dict[str, Outcome]:
    """The ordinary outcome of each comparison of (baseline's, model's) answers, by its id."""
    return {verdict.id: _outcome(verdict) for verdict in judge.rank(comparisons)}


def compare_logits(comparisons: Sequence[Comparison], judge: Judge) -> dict[str, Outcome]:
    """The weighted outcome by a judge in this process (kind: logits): the mean of both seats."""
    return {verdict.id: _weighted(verdict) for verdict in judge.rank(comparisons)}


def compare_weighted(
    comparisons: Sequence[Comparison], responder: Responder, seed: int
) -> dict[str, Outcome]:
    """The weighted outcome by a server, one call a comparison.

    Raises InputError for a server that gives no logprobs, and DataError for one that answers none.
    """
    asked = {each.id: ask_preference(each, seed) for each in comparisons}

    def read(reply: Reply) -> float | Unread:
        share = second_share(reply)
        return Unread(f"neither m nor M is likely after {reply.text!r}") if share is None else share

    # Asked again, the same probabilities would come.
    questions = {id: each.messages for id, each in asked.items()}
    judged = ask(responder, questions, read, sampling=ONE_TOKEN, retries=0)
    outcomes = {}
    for id, judgment in judged.items():
        is_first = asked[id].order[0] == 1
        if judgment.verdict is None:
            outcomes[id] = Outcome(None, reason=judgment.reason)
        else:
            win = 1 - judgment.verdict if is_first else judgment.verdict
            outcomes[id] = Outcome(win, (win,), (is_first,))
    return outcomes


def win_figures(outcomes: Sequence[tuple[str, Outcome]], *, seed: int) -> Figures:
    """The win rate as an estimate's fields, and what is behind it; each outcome with its prompt.

    `standard_error` takes every comparison for one of its own, as AlpacaEval's does.  `wins`,
    `ties` and `losses` are of comparisons, `discrete` is the mean of them.  `inconsistent`
    is the share of the comparisons with several calls whose calls disagree, and `first_seat` that
    of the calls with a winner that prefer the first seat: 0.5 without a bias; None without any.
    Raises ValueError without a single verdict.
    """
    read = [(prompt, each.win, each) for prompt, each in outcomes if each.win is not None]
    num_failed = len(outcomes) - len(read)
    values = [win for _, win, _ in read]
    sides = [_side(win) for win in values]
    discrete = [(prompt, side) for (prompt, _, _), side in zip(read, sides, strict=True)]
    several = [each.by_call for _, _, each in read if len(each.by_call) > 1]
    first = [
        (win > 0.5) == is_first
        for _, _, each in read
        for win, is_first in zip(each.by_call, each.model_first, strict=True)
        if win != 0.5
    ]
    rate = clustered_mean(
        [(prompt, win) for prompt, win, _ in read], seed=seed, num_failed=num_failed
    )
    return rate | {
        "standard_error": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
        "wins": sides.count(1.0),
        "ties": sides.count(0.5),
        "losses": sides.count(0.0),
        "discrete": clustered_mean(discrete, seed=seed, num_failed=num_failed),
        "inconsistent": mean(len(set(map(_side, wins))) > 1 for wins in several)
        if several
        else None,
        "first_seat": mean(first) if first else None,
    }


def percent(name: str, figures: Figures) -> Line:
    """A share's estimate as a line of a table, in percent."""
    low, high = (None if end is None else 100 * end for end in (figures["low"], figures["high"]))
    mean, n, num_failed = 100 * figures["mean"], figures["n"], figures["num_failed"]
    return Line(f"{name}, %", Estimate(mean, low, high, n, num_failed))


def _side(win: float) -> float:
    """1 for a win, 0 for a loss, 0.5 for a tie."""
    return 0.5 + 0.5 * ((win > 0.5) - (win < 0.5))


def _outcome(verdict: Ranking | Unparsed) -> Outcome:
    if isinstance(verdict, Unparsed):
        return Outcome(None, reason=verdict.reason)
    votes = _votes(verdict)
    wins = tuple(_won(dict(zip(vote.presented, vote.ranks or (), strict=True))) for vote in votes)
    if not wins:
        return Outcome(_won(dict(enumerate(verdict.ranks))))
    win = wins[0] if len(set(wins)) == 1 else 0.5
    return Outcome(win, wins, tuple(vote.presented[0] == 1 for vote in votes))


def _weighted(verdict: Ranking | Unparsed) -> Outcome:
    """From what the logits judge says: the labels' probabilities, A being the first seat's."""
    if isinstance(verdict, Unparsed):
        return Outcome(None, reason=verdict.reason)
    votes = _votes(verdict)
    wins = []
    for vote in votes:
        said = json.loads(vote.text)
        chances = dict(zip(vote.presented, (said["A"], said["B"]), strict=True))
        if not sum(chances.values()):
            return Outcome(None, reason=f"neither label has a probability: {vote.text}")
        wins.append(chances[1] / sum(chances.values()))
    return Outcome(mean(wins), tuple(wins), tuple(vote.presented[0] == 1 for vote in votes))


def _votes(verdict: Ranking) -> list[Vote]:
    """The calls that were shown both answers and read."""
    return [vote for vote in verdict.votes if vote.ranks is not None and len(vote.presented) == 2]


def _won(ranks: Mapping[int, int]) -> float:
    """The win of answer 1, the model's, over answer 0."""
    return 0.5 + 0.5 * ((ranks[1] < ranks[0]) - (ranks[1] > ranks[0]))
