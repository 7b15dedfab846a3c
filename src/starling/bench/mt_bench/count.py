"""From judgments, asked now or read from a file, to rows that can be counted.

Nothing is left out without a word: what has no score is counted as failed and says why.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from starling.base.errors import DataError, some
from starling.base.jsonl import read_records
from starling.bench.mt_bench.figures import Graded
from starling.bench.mt_bench.options import MtBench
from starling.bench.mt_bench.protocol import HIGHEST, LOWEST
from starling.data.fastchat import FAILED, Bench, PairJudgment, SingleJudgment, resolve


def read_ratings(options: MtBench, path: Path) -> tuple[list[SingleJudgment], int]:
    """A file's ratings of one model by one judge, and how many rows were duplicates."""
    rows = read_records(path, SingleJudgment, quarantine=options.out / "quarantine.jsonl")
    names = sorted({row.model for row in rows})
    if options.model is None and len(names) > 1:
        raise DataError(f"{path} holds judgments of {some(names, 8)}; choose one with --model NAME")
    own = [row for row in rows if row.model == (options.model or names[0])]
    if not own:
        raise DataError(f"{path} holds no judgments of {options.model!r}, but of {some(names, 8)}")
    own = _by_one_judge(own, options, path)
    keys = [(row.question_id, row.turn, row.repeat or 0) for row in own]
    if options.like_fastchat:
        return own, len(own) - len(set(keys))
    return resolve(path, own, keys, options.duplicates, "judgment of question, turn and round")


def read_pairs(options: MtBench, path: Path) -> tuple[list[PairJudgment], int]:
    """A file's comparisons by one judge, and how many rows were duplicates."""
    rows = read_records(path, PairJudgment, quarantine=options.out / "quarantine.jsonl")
    rows = _by_one_judge(rows, options, path)
    if (base := options.baseline) is not None:
        rows = [row for row in rows if base in (row.model_1, row.model_2)]
        if not rows:
            raise DataError(f"{path} holds no comparison with {base!r}")
    keys = [(row.question_id, row.turn, *sorted((row.model_1, row.model_2))) for row in rows]
    if options.like_fastchat:
        return rows, len(rows) - len(set(keys))
    return resolve(path, rows, keys, options.duplicates, "comparison of question, turn and models")


R = TypeVar("R", SingleJudgment, PairJudgment)


def _by_one_judge(rows: list[R], options: MtBench, path: Path) -> list[R]:
    judges = sorted({row.judge[0] for row in rows})
    if len(judges) == 1:
        return rows
    chosen = [row for row in rows if row.judge[0] == options.judge_model]
    if not chosen:
        raise DataError(
            f"{path} holds judgments by {some(judges, 8)}; choose one with --judge-model NAME"
        )
    return chosen


def grade_rows(
    bench: Bench, rows: Sequence[SingleJudgment], *, strict: bool
) -> tuple[list[Graded], list[str]]:
    """The ratings with their category, and of each that has no score or is missing, why.

    `strict` counts a score off the scale as none.  Raises DataError for a rating of a question
    that the bench does not have.
    """
    categories = {each.question_id: each.category for each in bench.questions}
    strangers = sorted({row.question_id for row in rows} - set(categories))
    if strangers:
        raise DataError(
            f"there are judgments of questions {some(list(map(str, strangers)), 8)}, which "
            "question.jsonl does not hold; give the questions that were judged"
        )
    graded: list[Graded] = []
    reasons: list[str] = []
    for row in rows:
        reason = None
        if row.score < 0:
            reason = row.reason or f"the score is {FAILED}, which stands for a failure"
        elif strict and not LOWEST <= row.score <= HIGHEST:
            reason = f"the score is {row.score:g}, and the scale is from 1 to 10"
        if reason is not None:
            reasons.append(f"question {row.question_id}, turn {row.turn}: {reason}")
        score = row.score if reason is None else None
        category = categories[row.question_id]
        graded.append(Graded(row.question_id, category, row.turn, score, row.repeat or 0))
    judged = {(row.question, row.turn) for row in graded}
    for each in bench.questions:
        for turn in range(1, len(each.turns) + 1):
            if (each.question_id, turn) not in judged:
                graded.append(Graded(each.question_id, each.category, turn, None))
                reasons.append(f"question {each.question_id}, turn {turn}: it was not judged")
    place = {each.question_id: number for number, each in enumerate(bench.questions)}
    return sorted(graded, key=lambda row: (row.repeat, place[row.question], row.turn)), reasons


def pair_reasons(rows: Sequence[PairJudgment]) -> list[str]:
    """Why comparisons have no verdict."""
    return [
        f"question {row.question_id}, turn {row.turn}: {row.reason or 'a call has no verdict'}"
        for row in rows
        if row.winner is None
    ]


def votes(rows: Sequence[PairJudgment]) -> list[dict[str, str]]:
    """The verdicts as `starling ratings` reads them, those without one left out."""
    votes = []
    for row in rows:
        if (winner := row.winner) is not None:
            seats = {row.model_1: "model_a", row.model_2: "model_b", "tie": "tie"}
            pair = {"model_a": row.model_1, "model_b": row.model_2}
            votes.append(pair | {"winner": seats[winner]})
    return votes
