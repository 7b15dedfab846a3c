"""MT-Bench's figures: flat means over (question, turn), and what FastChat leaves unsaid.

Every mean is over the judgments that have a score; how many have none, and how many rows were
duplicates, stands beside it.  Intervals are by bootstrap over questions.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from starling.base.errors import DataError
from starling.base.estimate import Estimate, bootstrap_mean, clustered_mean
from starling.bench.results import Line
from starling.data.fastchat import ModelAnswer, PairJudgment

Figures = dict[str, Any]


class Graded(NamedTuple):
    """One judgment of one turn's answer (turn 1 or 2); the score is None where there is none."""

    question: int
    category: str
    turn: int
    score: float | None
    repeat: int = 0


def score_figures(rows: Sequence[Graded], *, num_duplicates: int = 0, seed: int = 0) -> Figures:
    """Unrounded means as FastChat makes them, their estimates, n and failures.

    Raises DataError where no judgment has a score.
    """
    if all(row.score is None for row in rows):
        raise DataError(f"none of {len(rows)} judgments has a score, so there is no average")
    turns = {f"turn{n}": [row for row in rows if row.turn == n] for n in (1, 2)}
    categories = dict.fromkeys(row.category for row in rows)
    estimates: Figures = {"average": _estimate(rows, seed)}
    estimates |= {name: _estimate(own, seed) for name, own in turns.items()}
    estimates["categories"] = {
        name: _estimate([row for row in rows if row.category == name], seed) for name in categories
    }
    scored = estimates["average"]
    return {
        **{name: _mean(estimates[name]) for name in ("average", "turn1", "turn2")},
        "categories": {name: _mean(each) for name, each in estimates["categories"].items()},
        "n": scored["n"],
        "failed": scored["num_failed"],
        "duplicates": num_duplicates,
        "estimates": estimates,
        "repeats": _repeats(rows),
    }


def _estimate(rows: Sequence[Graded], seed: int) -> Figures | None:
    """None where no row has a score."""
    scores = [(row.question, row.score) for row in rows if row.score is not None]
    if not scores:
        return None
    return clustered_mean(scores, seed=seed, num_failed=len(rows) - len(scores))


def _mean(estimate: Figures | None) -> float | None:
    return None if estimate is None else estimate["mean"]


def _repeats(rows: Sequence[Graded]) -> Figures | None:
    """The noise of a judge that is asked again: of the average, and of one judgment.

    None for a single round.  `judgment_sd` is pooled over answers: the root of the mean variance.
    """
    rounds = sorted({row.repeat for row in rows})
    if len(rounds) < 2:
        return None
    by_round = [
        [row.score for row in rows if row.repeat == number and row.score is not None]
        for number in rounds
    ]
    averages = [mean(scores) for scores in by_round if scores]
    by_answer: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        if row.score is not None:
            by_answer.setdefault((row.question, row.turn), []).append(row.score)
    variances = [stdev(scores) ** 2 for scores in by_answer.values() if len(scores) > 1]
    return {
        "rounds": len(rounds),
        "averages": averages,
        "average_sd": stdev(averages) if len(averages) > 1 else None,
        "judgment_sd": math.sqrt(mean(variances)) if variances else None,
    }


def length_figures(answers: Sequence[ModelAnswer], seed: int) -> Figures:
    """Characters and words an answer, and tokens where all of them are known."""
    texts = [(row.question_id, text) for row in answers for text in row.turns]
    figures = {
        "characters": clustered_mean([(id, len(text)) for id, text in texts], seed=seed),
        "words": clustered_mean([(id, len(text.split())) for id, text in texts], seed=seed),
    }
    tokens = [(row.question_id, count) for row in answers for count in row.choices[0].tokens or ()]
    if len(tokens) == len(texts):
        figures["tokens"] = clustered_mean(tokens, seed=seed)
    return figures


def score_lines(figures: Figures) -> list[Line]:
    """The figures as a table's lines: average, turns, categories."""
    estimates = figures["estimates"]
    duplicates = figures["duplicates"]
    named = {"average": estimates["average"], "turn 1": estimates["turn1"]}
    named |= {"turn 2": estimates["turn2"]} | estimates["categories"]
    return [
        Line(name, Estimate(**each), duplicates if name == "average" else 0)
        for name, each in named.items()
        if each is not None
    ]


def length_lines(lengths: Figures) -> list[Line]:
    """Tokens an answer, where they are known, else characters; and words."""
    units = ("tokens" if "tokens" in lengths else "characters", "words")
    return [Line(f"{unit} an answer", Estimate(**lengths[unit])) for unit in units]


def pair_figures(
    rows: Sequence[PairJudgment], *, num_duplicates: int = 0, seed: int = 0
) -> Figures:
    """Wins, losses and ties of every model, and its win rate with a tie as half a win.

    A comparison is two calls with seats swapped: one that lacks a verdict has failed, and calls
    that disagree tie.  `first_seat` is the share of calls with a winner that prefer seat A.
    """
    models = sorted({name for row in rows for name in (row.model_1, row.model_2)})
    read = [row for row in rows if row.winner is not None]
    if not read:
        raise DataError(f"none of {len(rows)} comparisons has a verdict, so there is no win rate")
    seats = [
        winner == first
        for row in rows
        for winner, first in ((row.g1_winner, "model_1"), (row.g2_winner, "model_2"))
        if winner in ("model_1", "model_2")
    ]
    return {
        "models": {name: _record(name, rows, seed) for name in models},
        "n": len(read),
        "failed": len(rows) - len(read),
        "duplicates": num_duplicates,
        "inconsistent": mean(row.g1_winner != row.g2_winner for row in read),
        "first_seat": mean(seats) if seats else None,
    }


def _record(name: str, rows: Sequence[PairJudgment], seed: int) -> Figures:
    own = [row for row in rows if name in (row.model_1, row.model_2)]
    read = [(row.question_id, row.winner) for row in own if row.winner is not None]
    wins = [winner == name for _, winner in read]
    ties = [winner == "tie" for _, winner in read]
    if not read:
        return {"win": 0, "loss": 0, "tie": 0, "failed": len(own), "win_rate_adjusted": None}
    values = [win + tie / 2 for win, tie in zip(wins, ties, strict=True)]
    ids = [id for id, _ in read]
    adjusted = bootstrap_mean(values, seed=seed, num_failed=len(own) - len(read), clusters=ids)
    return {
        "win": sum(wins),
        "loss": len(read) - sum(wins) - sum(ties),
        "tie": sum(ties),
        "failed": len(own) - len(read),
        "win_rate": mean(wins),
        "loss_rate": 1 - mean(wins) - mean(ties),
        "win_rate_adjusted": vars(adjusted).copy(),
    }


def pair_lines(figures: Figures) -> list[Line]:
    """The models' win rates, best first."""
    rated = {
        name: Estimate(**record["win_rate_adjusted"])
        for name, record in figures["models"].items()
        if record["win_rate_adjusted"] is not None
    }
    return [
        Line(f"{name} ({_counts(figures['models'][name])})", rated[name])
        for name in sorted(rated, key=lambda name: -rated[name].mean)
    ]


def _counts(record: Figures) -> str:
    return f"{record['win']} won, {record['tie']} tied, {record['loss']} lost"
