"""MT-Bench inside a run: the stage's two policies, judged as published.

The verdicts come back in the stage's own shapes, so that its figures and report are the usual ones;
FastChat's files stand beside them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from starling.base.estimate import clustered_mean
from starling.bench.answers import Answer
from starling.bench.asking import refuse_failures
from starling.bench.mt_bench.answers import Answers, as_fastchat
from starling.bench.mt_bench.count import pair_reasons
from starling.bench.mt_bench.judge import (
    ask_canaries,
    ask_pairs,
    ask_ratings,
    pair_tasks,
    rating_tasks,
)
from starling.bench.scores import Judged
from starling.data.fastchat import FAILED, Bench, PairJudgment, SingleJudgment, write_rows
from starling.judging.judge import Rating
from starling.models.interfaces import Responder


def by_policy(bench: Bench, answers: Sequence[Answer], names: Sequence[str]) -> Answers:
    """The policies' answers in FastChat's rows."""
    return {
        name: as_fastchat(name, bench, [row for row in answers if row.policy == name])
        for name in names
    }


class Asked(NamedTuple):
    """What is judged, by whom, and which share of the judgments may fail."""

    bench: Bench
    answers: Answers
    responder: Responder
    judge: str
    allowed: float
    seed: int


def judge_as_published(asked: Asked, out: Path) -> Judged:
    """Ratings, win rate of the second policy and canaries; FastChat's files go to `out`."""
    rated, ratings = rate(asked)
    wins, rows, pairs = compare(asked)
    write_files(out, asked, ratings, pairs)
    *_, policy = asked.answers
    scores = [rating.score for rating in rated.values()]
    bench, answers, responder, judge, _, seed = asked
    canaries = ask_canaries(responder, bench, answers[policy], judge, scores, seed)
    return Judged(rated, wins, rows, {"ratings": canaries})


def rate(asked: Asked) -> tuple[dict[tuple[str, str, int], Rating], list[SingleJudgment]]:
    """The ratings by (policy, question, turn), and all judgments.

    Raises DataError when more than the allowed share of them failed.
    """
    bench, answers, responder, judge, allowed, _ = asked
    judgments = [
        row
        for name, own in answers.items()
        for row in ask_ratings(
            responder, rating_tasks(bench, own, name), judge, repeat=0, strict=True
        )
    ]
    failed = [row for row in judgments if row.score == FAILED]
    reasons = [f"{row.model}/{row.question_id}/{row.turn}: {row.reason}" for row in failed]
    refuse_failures("ratings", reasons, len(judgments), allowed)
    rated = {
        (row.model, str(row.question_id), row.turn): Rating(
            f"{row.model}/{row.question_id}/{row.turn}", row.score, row.judgment
        )
        for row in judgments
        if row.score != FAILED
    }
    return rated, judgments


def compare(
    asked: Asked,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[PairJudgment]]:
    """The win rate of the second policy over the first, a row each turn, and all judgments.

    Both orders are asked; where they disagree it is a tie, half a win.  Raises like `rate`.
    """
    bench, answers, responder, judge, allowed, seed = asked
    baseline, policy = answers
    judgments = ask_pairs(responder, pair_tasks(bench, answers, None), judge, strict=True)
    reasons = pair_reasons(judgments)
    refuse_failures("comparisons", reasons, len(judgments), allowed)
    categories = {each.question_id: each.category for each in bench.questions}
    worth = {baseline: 0.0, "tie": 0.5, policy: 1.0}
    rows = [
        {
            "id": str(row.question_id),
            "category": categories[row.question_id],
            "turn": row.turn,
            "win": worth[winner],
        }
        for row in judgments
        if (winner := row.winner) is not None
    ]
    wins = [(row["id"], row["win"]) for row in rows]
    return clustered_mean(wins, seed=seed, num_failed=len(reasons)), rows, judgments


def write_files(
    out: Path, asked: Asked, ratings: Sequence[SingleJudgment], pairs: Sequence[PairJudgment]
) -> None:
    """FastChat's files; without times, since the same run writes the same bytes."""
    write_rows(out / "question.jsonl", asked.bench.questions)
    for name, own in asked.answers.items():
        write_rows(out / "model_answer" / f"{name}.jsonl", list(own.values()))
    write_rows(out / "model_judgment" / "judge_single.jsonl", ratings)
    write_rows(out / "model_judgment" / "judge_pair.jsonl", pairs)
