"""Figures from answers and verdicts: every mean with its interval, its n and its failures.

Intervals are by bootstrap over questions: the turns of one question are not independent.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from starling.base.estimate import Estimate, clustered_mean
from starling.bench.answers import Answer
from starling.bench.asking import refuse_failures
from starling.bench.results import Line
from starling.bench.win_rate import SAME, Outcome, compare, percent, win_figures
from starling.judging.judge import Comparison, GradedAnswer, Judge, Rating

BASELINE, POLICY = "sft", "ppo"

Figures = dict[str, Any]


class Judged(NamedTuple):
    """What the judge made of the sampled answers: ratings by (policy, question, turn), the win
    rate with a row for each comparison, and how cheating answers fared."""

    ratings: dict[tuple[str, str, int], Rating]
    win_rate: Figures
    win_rows: list[Figures]
    canaries: Figures


def gold_figures(answers: Sequence[Answer], seed: int) -> Figures:
    """Gold in 0..1, sampled and greedy, in total and by part; {} where answers lack checks."""
    if any(answer.checks is None for answer in answers):
        return {}
    figures: Figures = {}
    for part in ("total", "correctness", "style", "brevity"):
        name = "gold" if part == "total" else f"gold_{part}"
        grade = attrgetter(f"gold.{part}")
        figures[name] = _means(answers, "sampled", grade, seed)
        figures[f"{name}_greedy"] = _means(answers, "greedy", grade, seed)
    return figures


def token_figures(answers: Sequence[Answer], seed: int) -> Figures:
    """Tokens per sampled answer, end marker included: verbosity stands beside every score."""
    return _means(answers, "sampled", lambda answer: answer.tokens, seed)


def _means(
    answers: Sequence[Answer], decoding: str, value: Callable[[Answer], float], seed: int
) -> Figures:
    """The mean value of an answer, by policy."""
    return {
        policy: clustered_mean(
            [(answer.question, value(answer)) for answer in select(answers, policy, decoding)],
            seed=seed,
        )
        for policy in (BASELINE, POLICY)
    }


def select(answers: Sequence[Answer], policy: str, decoding: str = "sampled") -> list[Answer]:
    """The answers of one policy in one way of decoding."""
    return [a for a in answers if a.policy == policy and a.decoding == decoding]


def graded(answer: Answer) -> GradedAnswer:
    """The answer as a judge is asked to rate it."""
    return GradedAnswer(
        f"{answer.policy}/{answer.question}/{answer.turn}",
        answer.messages,
        answer.answer,
        answer.checks,
        answer.finish_reason == "stop",
    )


def ratings(
    answers: Sequence[Answer], judge: Judge, *, allowed_failures: float
) -> dict[tuple[str, str, int], Rating]:
    """The judge's 1 to 10 for each sampled answer, by (policy, question, turn).

    Raises DataError when more than `allowed_failures` of the verdicts could not be read: a mean
    over what is left would not be a score.
    """
    sampled = [answer for answer in answers if answer.decoding == "sampled"]
    asked = map(graded, sampled)
    read: dict[tuple[str, str, int], Rating] = {}
    failures: list[str] = []
    for answer, verdict in zip(sampled, judge.rate(asked), strict=True):
        if isinstance(verdict, Rating):
            read[answer.policy, answer.question, answer.turn] = verdict
        else:
            failures.append(f"{verdict.id}: {verdict.reason}")
    refuse_failures("ratings", failures, len(sampled), allowed_failures)
    return read


def score_figures(
    read: dict[tuple[str, str, int], Rating], answers: Sequence[Answer], seed: int
) -> Figures:
    """Mean rating by policy, over all turns and each; what has no rating at all is left out."""
    figures: Figures = {}
    for name, turn in (("score", None), ("score_turn_1", 1), ("score_turn_2", 2)):
        for policy in (BASELINE, POLICY):
            own = select(answers, policy)
            keys = [(policy, a.question, a.turn) for a in own if turn in (None, a.turn)]
            known = [(key[1], read[key].score) for key in keys if key in read]
            if known:
                figures.setdefault(name, {})[policy] = clustered_mean(
                    known, seed=seed, num_failed=len(keys) - len(known)
                )
    return figures


def win_rate(
    answers: Sequence[Answer], judge: Judge, *, seed: int, allowed_failures: float
) -> tuple[Figures, list[Figures]]:
    """Share of (question, turn) that the judge gives to the policy; equal answers are half a win.

    Each turn is judged after the baseline's conversation up to it, so a second turn that leans on
    the first favours the baseline.  A judge made for `both_seats` shows each answer first once.
    Returns the estimate with what is behind it (`win_figures`), and one row per comparison.
    """
    old, new = (
        {(a.question, a.turn): a for a in select(answers, policy)} for policy in (BASELINE, POLICY)
    )
    pairs = [(old[key], new[key]) for key in old]
    comparisons = [
        Comparison(
            f"win/{before.question}/{before.turn}",
            before.messages,
            (before.answer, after.answer),
            before.checks,
            (before.finish_reason == "stop", after.finish_reason == "stop"),
        )
        for before, after in pairs
        if before.answer != after.answer
    ]
    outcomes = compare(comparisons, judge)
    rows: list[Figures] = []
    failures: list[str] = []
    counted: list[tuple[str, Outcome]] = []
    for before, _ in pairs:
        outcome = outcomes.get(f"win/{before.question}/{before.turn}", SAME)
        counted.append((before.question, outcome))
        if outcome.win is None:
            failures.append(f"{before.question}/{before.turn}: {outcome.reason}")
        else:
            row = {"id": before.question, "category": before.category, "turn": before.turn}
            rows.append(row | {"win": outcome.win})
    refuse_failures("comparisons", failures, len(pairs), allowed_failures)
    return win_figures(counted, seed=seed), rows


def category_figures(
    answers: Sequence[Answer],
    read: dict[tuple[str, str, int], Rating],
    wins: Sequence[Figures],
    seed: int,
) -> Figures:
    """The same figures for each category by itself."""
    figures: Figures = {}
    for category in dict.fromkeys(answer.category for answer in answers):
        own = [answer for answer in answers if answer.category == category]
        own_wins = [(row["id"], row["win"]) for row in wins if row["category"] == category]
        figures[category] = gold_figures(own, seed) | score_figures(read, own, seed)
        figures[category]["tokens_per_answer"] = token_figures(own, seed)
        if own_wins:
            figures[category]["win_rate"] = clustered_mean(own_wins, seed=seed)
    return figures


def lines(figures: Figures) -> list[Line]:
    """The figures that are said first, of both policies, as a table's lines."""
    named = {
        "gold": "gold, sampled",
        "gold_greedy": "gold, greedy",
        "score": "judge's score",
        "score_turn_1": "turn 1",
        "score_turn_2": "turn 2",
        "tokens_per_answer": "tokens an answer",
    }
    found = [
        Line(f"{label}, {side}", Estimate(**figures[name][policy]))
        for name, label in named.items()
        if name in figures
        for policy, side in ((BASELINE, "before"), (POLICY, "after"))
        if policy in figures[name]
    ]
    return [*found, percent("win rate, after", figures["win_rate"])]
