"""Check candidates and judge: does position, length or a model's name decide the rankings?

Nectar's authors measured their judge's bias for the first position with chi-square over the slots
of the winners (reference: Starling-7B, COLM 2024); the same table is made of every run here.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt
from typing import Any

from starling.base.estimate import clustered_mean
from starling.feedback.candidates import AnswerSet
from starling.judging.judge import Ranking, Unparsed
from starling.judging.recorded import CallStats

NORMAL_99 = 2.3263478740408408
NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Outcome:
    """What became of one prompt; the verdict is None where there was nothing to rank."""

    answers: AnswerSet
    verdict: Ranking | Unparsed | None

    @property
    def failure(self) -> str | None:
        """Why this prompt has no ranking, if a call is to blame; answers that agree are not."""
        if isinstance(self.verdict, Unparsed):
            return self.verdict.reason
        if self.verdict is None and self.answers.failures:
            return f"too few answers; {self.answers.failures[0]}"
        return None


def audit(
    outcomes: Sequence[Outcome], calls: Mapping[str, CallStats], *, num_duplicates: int, seed: int
) -> dict[str, Any]:
    """The audit as JSON: counts, and what position, model and length have to do with rank."""
    ranked = [
        (outcome.answers, outcome.verdict)
        for outcome in outcomes
        if isinstance(outcome.verdict, Ranking)
    ]
    if not ranked:
        raise ValueError("an audit needs at least one ranking")
    natures = [(r.id, float(r.good_natured)) for _, r in ranked if r.good_natured is not None]
    return {
        **_counts(outcomes, num_duplicates),
        "good_natured": _estimate(natures, seed, len(ranked) - len(natures)),
        "positions": _positions([ranking for _, ranking in ranked]),
        "models": _models(ranked, seed),
        "length": _length(ranked, seed),
        "calls": {name: stats.results() for name, stats in calls.items()},
    }


def chi_square(counts: Sequence[int]) -> float:
    """Pearson's statistic of the counts against all being equally likely."""
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


def critical_99(degrees: int) -> float:
    """What chi-square exceeds once in a hundred by chance.

    Wilson and Hilferty's cube root (PNAS 1931): 0.7 % low at one degree, under 0.2 % from three on.
    """
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + NORMAL_99 * sqrt(spread)) ** 3


def _counts(outcomes: Sequence[Outcome], num_duplicates: int) -> dict[str, Any]:
    sets = [outcome.answers for outcome in outcomes]
    unparsed = [outcome.verdict for outcome in outcomes if isinstance(outcome.verdict, Unparsed)]
    unranked = [outcome for outcome in outcomes if outcome.verdict is None]
    answers = [answer for answer_set in sets for answer in answer_set.answers]
    return {
        "prompts": len(outcomes),
        "duplicate_prompts": num_duplicates,
        "rankings": sum(isinstance(outcome.verdict, Ranking) for outcome in outcomes),
        "unparsed": len(unparsed),
        "unparsed_examples": [
            {"id": verdict.id, "reason": verdict.reason} for verdict in unparsed[:NUM_EXAMPLES]
        ],
        "too_few_answers": {
            "after_failures": sum(outcome.failure is not None for outcome in unranked),
            "alike": sum(outcome.failure is None for outcome in unranked),
        },
        "answers": {
            "distinct": len(answers),
            "merged": sum(answer_set.num_merged for answer_set in sets),
            "failed": sum(len(answer_set.failures) for answer_set in sets),
            "empty": sum(answer_set.num_empty for answer_set in sets),
            "truncated": sum(answer.finish_reason == "length" for answer in answers),
        },
    }


def _positions(rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """One table per number of answers: the winner's place and the mean rank at each place."""
    by_k: defaultdict[int, list[Ranking]] = defaultdict(list)
    for ranking in rankings:
        by_k[len(ranking.ranks)].append(ranking)
    tables = []
    for k, group in sorted(by_k.items()):
        shown = ([ranking.ranks[index] for index in ranking.presented] for ranking in group)
        columns = list(zip(*shown, strict=True))
        wins = [column.count(1) for column in columns]
        statistic, critical = chi_square(wins), critical_99(k - 1)
        tables.append(
            {
                "k": k,
                "rankings": len(group),
                "winner_share": [count / sum(wins) for count in wins],
                "mean_rank": [sum(column) / len(column) for column in columns],
                "chi_square": statistic,
                "critical_99": critical,
                "is_biased": statistic > critical,
            }
        )
    return tables


def _models(ranked: Sequence[tuple[AnswerSet, Ranking]], seed: int) -> dict[str, Any]:
    ranks: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
    for answer_set, ranking in ranked:
        for answer, rank in zip(answer_set.answers, ranking.ranks, strict=True):
            ranks[answer.model].append((ranking.id, float(rank)))
    return {
        model: {"mean_rank": _estimate(values, seed)} for model, values in sorted(ranks.items())
    }


def _length(ranked: Sequence[tuple[AnswerSet, Ranking]], seed: int) -> dict[str, Any]:
    """How often the longer of two answers, in characters, is the better ranked one."""
    longer_wins: list[tuple[str, float]] = []
    counts: Counter[str] = Counter(tied_pairs=0, equally_long_pairs=0)
    for answer_set, ranking in ranked:
        lengths = [len(answer.answer) for answer in answer_set.answers]
        for one, other in combinations(zip(lengths, ranking.ranks, strict=True), 2):
            if one[1] == other[1]:
                counts["tied_pairs"] += 1
            elif one[0] == other[0]:
                counts["equally_long_pairs"] += 1
            else:
                longer, shorter = max(one, other), min(one, other)
                longer_wins.append((ranking.id, float(longer[1] < shorter[1])))
    return {"longer_wins": _estimate(longer_wins, seed), **counts}


def _estimate(values: Sequence[tuple[str, float]], seed: int, num_failed: int = 0) -> Any:
    return clustered_mean(values, seed=seed, num_failed=num_failed) if values else None
