"""Four ways to make a ranking of K answers out of calls, each a list of questions and a rule.

kwise            1 call that ranks all K, shuffled, every pair walked through
kwise-repeated   `repeats` such calls or, above K, the next multiple of K, so that every answer has
                 every place as often; aggregated
pairwise         K(K-1) calls, every pair in both orders; aggregated
pointwise        K ratings from 1 to 10

Aggregated means ranked by the Plackett-Luce strengths of the votes (`base.rating`).  A pair whose
two orders disagree has one win each way, which is a tie.  Where votes are missing, a rule ranks by
those that are there if they suffice, and says that they do not otherwise; no rank is made up.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from starling.base.rating import kendall_w, plackett_luce, ranks_from
from starling.base.seeding import python_generator
from starling.data.records import Message
from starling.judging.judge import Comparison, GradedAnswer, Ranking, Unparsed, Vote
from starling.judging.kwise import Presented, lay_out, present, shuffled_pairs
from starling.judging.rating import rating_messages

TIE = 1e-6
"""Log-strengths closer than this are equal: what is left between equals is rounding."""


class Question(NamedTuple):
    """One call: `presented` says which answers `messages` show, in the order of their places.

    `id` is the call's own among all calls of one `rank`.  `key` names its random streams; the first
    of repeated calls has that of the single call, so its reply need not be bought again.
    """

    id: str
    key: str
    presented: tuple[int, ...]
    messages: tuple[Message, ...]
    subject: Comparison | GradedAnswer


Verdict = Ranking | Unparsed


class Strategy(NamedTuple):
    """What to ask about a comparison with a seed, and what the votes, in that order, come to."""

    ask: Callable[[Comparison, int], list[Question]]
    conclude: Callable[[Comparison, tuple[Vote, ...]], Verdict]


def choose_strategy(
    name: Literal["kwise", "kwise-repeated", "pairwise", "pointwise"], repeats: int
) -> Strategy:
    """The strategy of that name; `repeats` is for kwise-repeated alone."""
    return {
        "kwise": KWISE,
        "kwise-repeated": Strategy(partial(_ask_repeatedly, repeats=repeats), _conclude_ranked),
        "pairwise": Strategy(_ask_pairs, _conclude_pairs),
        "pointwise": Strategy(_ask_ratings, _conclude_ratings),
    }[name]


def num_calls(name: str, repeats: int, k: int) -> int:
    """Calls for one ranking of k answers."""
    even = -(-repeats // k) * k if repeats > k else repeats
    return {"kwise": 1, "kwise-repeated": even, "pairwise": k * (k - 1), "pointwise": k}[name]


def rating_question(answer: GradedAnswer, seed: int, place: int = 0) -> Question:
    """The call that rates one answer, the one given as number `place`."""
    return Question(answer.id, answer.id, (place,), rating_messages(answer, seed), answer)


def _ask_once(comparison: Comparison, seed: int) -> list[Question]:
    return [_question(comparison.id, comparison.id, present(comparison, seed))]


def _ask_repeatedly(comparison: Comparison, seed: int, *, repeats: int) -> list[Question]:
    # Turned evenly, not shuffled anew: no answer has the first place again while another has none.
    k = len(comparison.answers)
    turns = min(repeats, k)
    questions = [_question(f"{comparison.id}/0", comparison.id, present(comparison, seed))]
    for number in range(1, num_calls("kwise-repeated", repeats, k)):
        key = f"{comparison.id}/{number}"
        rng = python_generator(seed, f"judging/present/{key}")
        if number % turns == 0:
            order = tuple(rng.sample(range(k), k))
        else:
            start = questions[number - number % turns].presented
            by = number % turns * k // turns
            order = start[by:] + start[:by]
        shown = lay_out(comparison, order, shuffled_pairs(k, rng), seed=seed, key=key)
        questions.append(_question(key, key, shown))
    return questions


def _ask_pairs(comparison: Comparison, seed: int) -> list[Question]:
    pairs = combinations(range(len(comparison.answers)), 2)
    orders = [order for one, other in pairs for order in ((one, other), (other, one))]
    keys = [f"{comparison.id}/{number}" for number in range(len(orders))]
    return [
        _question(key, key, lay_out(comparison, order, [("A", "B")], seed=seed, key=key))
        for key, order in zip(keys, orders, strict=True)
    ]


def _ask_ratings(comparison: Comparison, seed: int) -> list[Question]:
    finished = comparison.finished or (True,) * len(comparison.answers)
    questions = []
    for place, text in enumerate(comparison.answers):
        id, messages = f"{comparison.id}/{place}", comparison.messages
        answer = GradedAnswer(id, messages, text, comparison.checks, finished[place])
        questions.append(rating_question(answer, seed, place))
    return questions


def _question(id: str, key: str, shown: Presented) -> Question:
    return Question(id, key, shown.presented, shown.messages, shown.shown)


def _conclude_ranked(comparison: Comparison, votes: tuple[Vote, ...]) -> Verdict:
    """Votes on all answers: one is the verdict as it stands, several are aggregated."""
    read = [vote for vote in votes if vote.ranks is not None]
    if not read:
        return _unparsed(comparison, votes)
    k = len(comparison.answers)
    by_answer = [tuple(_placed(vote)[answer] for answer in range(k)) for vote in read]
    ranks = by_answer[0] if len(read) == 1 else _aggregate(read, k)
    return Ranking(comparison.id, ranks, votes, _good_natured(votes), kendall_w(by_answer))


def _conclude_pairs(comparison: Comparison, votes: tuple[Vote, ...]) -> Verdict:
    both = [
        pair
        for pair in zip(votes[::2], votes[1::2], strict=True)
        if all(vote.ranks is not None for vote in pair)
    ]
    k = len(comparison.answers)
    if not _connects([pair[0].presented for pair in both], k):
        why = f", and the pairs read in both orders do not connect all {k} answers"
        return _unparsed(comparison, votes, why)
    ranks = _aggregate([vote for pair in both for vote in pair], k)
    compared = {pair[0].presented for pair in both}
    for tied in combinations(range(k), 2):
        # Equal strengths of two that never met say only that nothing tells them apart.
        if ranks[tied[0]] == ranks[tied[1]] and tied not in compared:
            why = f", and answers {tied[0] + 1} and {tied[1] + 1}, not compared, come out equal"
            return _unparsed(comparison, votes, why)
    return Ranking(comparison.id, ranks, votes, _good_natured(votes))


def _conclude_ratings(comparison: Comparison, votes: tuple[Vote, ...]) -> Verdict:
    scores = [vote.score for vote in votes if vote.score is not None]
    if len(scores) < len(votes):
        return _unparsed(comparison, votes)
    return Ranking(comparison.id, ranks_from(scores), votes)


def _placed(vote: Vote) -> dict[int, int]:
    """Each answer's rank in one vote that could be read."""
    assert vote.ranks is not None
    return dict(zip(vote.presented, vote.ranks, strict=True))


def _aggregate(votes: list[Vote], k: int) -> tuple[int, ...]:
    strengths = plackett_luce(map(_placed, votes), k)
    return ranks_from(np.log(strengths).tolist(), tolerance=TIE)


def _connects(pairs: list[tuple[int, ...]], k: int) -> bool:
    reached = {0}
    for _ in range(k):
        reached |= {end for pair in pairs if reached & set(pair) for end in pair}
    return len(reached) == k


def _good_natured(votes: tuple[Vote, ...]) -> bool | None:
    """What most votes that say so say; None when none does, or as many say yes as no."""
    said = [vote.good_natured for vote in votes]
    yes, no = said.count(True), said.count(False)
    return None if yes == no else yes > no


def _unparsed(comparison: Comparison, votes: tuple[Vote, ...], why: str = "") -> Unparsed:
    failed = [vote for vote in votes if vote.reason is not None]
    reason = failed[0].reason or ""
    if len(votes) > 1:
        reason = f"{len(failed)} of {len(votes)} votes could not be read{why}; the first: {reason}"
    return Unparsed(comparison.id, reason, failed[0].text, votes)


KWISE = Strategy(_ask_once, _conclude_ranked)
