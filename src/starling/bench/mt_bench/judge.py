"""Judge answers as MT-Bench does, and keep what was said in FastChat's columns.

What is asked is `grading`'s matter; what the verdicts come to, `mt_scores`'.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

from starling.bench.asking import Judgment, Unread, ask
from starling.bench.mt_bench.answers import Answers
from starling.bench.mt_bench.protocol import (
    JUDGE_TOKENS,
    Shown,
    Verdict,
    read_any_score,
    read_score,
    read_winner,
    show_answer,
    show_pair,
)
from starling.data.fastchat import (
    FAILED,
    Bench,
    ModelAnswer,
    MtQuestion,
    PairJudgment,
    SingleJudgment,
    Winner,
)
from starling.judging.canaries import BEST_RATING, canary_answers, canary_figures, fared_rated
from starling.models.interfaces import Reply, Responder, Sampling


class Task(NamedTuple):
    """One call: about a turn of a question, by one model, or by two with the first in seat A."""

    question: MtQuestion
    turn: int
    models: tuple[str, ...]
    shown: Shown


def rating_tasks(bench: Bench, answers: Mapping[int, ModelAnswer], model: str) -> list[Task]:
    """A call per answer: 160 for MT-Bench's 80 questions."""
    return [
        Task(each, turn, (model,), show_answer(bench, each, answers[each.question_id].turns, turn))
        for each in bench.questions
        for turn in range(1, len(each.turns) + 1)
    ]


def pair_tasks(bench: Bench, answers: Answers, baseline: str | None) -> list[Task]:
    """Two calls, seats swapped, per turn and pair: all pairs, or those with the baseline."""
    if baseline is None:
        pairs = list(combinations(answers, 2))
    else:
        pairs = [(name, baseline) for name in answers if name != baseline]
    tasks = []
    for question in bench.questions:
        for turn in range(1, len(question.turns) + 1):
            for one, other in (seats for pair in pairs for seats in (pair, pair[::-1])):
                first, second = (answers[name][question.question_id].turns for name in (one, other))
                shown = show_pair(bench, question, first, second, turn)
                tasks.append(Task(question, turn, (one, other), shown))
    return tasks


def ask_ratings(
    responder: Responder, tasks: Sequence[Task], judge: str, *, repeat: int, strict: bool
) -> list[SingleJudgment]:
    """The judge's rating of every answer; of round `repeat`, each a call of its own.

    Not `strict` reads as FastChat does: any number is a score, and nothing is asked again.
    """
    read = read_score if strict else read_any_score
    judgments = _ask(responder, tasks, read, repeat=repeat, retries=2 if strict else 0)
    return [
        SingleJudgment(
            question_id=task.question.question_id,
            model=task.models[0],
            judge=(judge, task.shown.prompt),
            user_prompt=task.shown.user_prompt,
            judgment=judgment.text,
            score=FAILED if judgment.verdict is None else judgment.verdict,
            turn=task.turn,
            reason=judgment.reason,
            repeat=repeat or None,
            retried=judgment.retried or None,
            served_by=_version(judge, judgment),
        )
        for task, judgment in zip(tasks, judgments, strict=True)
    ]


def ask_pairs(
    responder: Responder, tasks: Sequence[Task], judge: str, *, strict: bool
) -> list[PairJudgment]:
    """The judge's verdict on every pair in both orders; `tasks` come two by two."""
    judgments = _ask(responder, tasks, read_winner, repeat=0, retries=2 if strict else 0)
    both = zip(tasks[::2], judgments[::2], judgments[1::2], tasks[1::2], strict=True)
    return [
        PairJudgment(
            question_id=task.question.question_id,
            model_1=task.models[0],
            model_2=task.models[1],
            g1_winner=_winner(first.verdict, "model_1", "model_2"),
            g2_winner=_winner(second.verdict, "model_2", "model_1"),
            judge=(judge, task.shown.prompt),
            g1_user_prompt=task.shown.user_prompt,
            g1_judgment=first.text,
            g2_user_prompt=swapped.shown.user_prompt,
            g2_judgment=second.text,
            turn=task.turn,
            reason=first.reason or second.reason,
            served_by=_version(judge, first),
        )
        for task, first, second, swapped in both
    ]


def ask_canaries(
    responder: Responder,
    bench: Bench,
    answers: Mapping[int, ModelAnswer],
    judge: str,
    scores: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """How answers that cheat are rated in the place of some of a model's first turns.

    `scores` are ratings of honest answers: a canary that gets their mean has won.
    """
    canaries = canary_answers([str(id) for id in answers], seed, BEST_RATING)
    tasks = []
    for each in bench.questions:
        if (canary := canaries.get(str(each.question_id))) is not None:
            cheated = (canary.text, *answers[each.question_id].turns[1:])
            tasks.append(Task(each, 1, (canary.kind,), show_answer(bench, each, cheated, 1)))
    rows = ask_ratings(responder, tasks, judge, repeat=0, strict=True)
    mean = sum(scores) / len(scores)
    rated = ((row.model, None if row.score == FAILED else row.score) for row in rows)
    return canary_figures(fared_rated(kind, score, mean) for kind, score in rated)


V = TypeVar("V")


def _ask(
    responder: Responder,
    tasks: Sequence[Task],
    read: Callable[[Reply], V | Unread],
    *,
    repeat: int,
    retries: int,
) -> list[Judgment[V]]:
    named = {
        f"{task.question.question_id}/{task.turn}/{'/'.join(task.models)}": task.shown.messages
        for task in tasks
    }
    sampling = Sampling(JUDGE_TOKENS, 0.0, seed=repeat)
    return list(ask(responder, named, read, sampling=sampling, retries=retries).values())


def _version(judge: str, judgment: Judgment) -> str | None:
    return None if judgment.served_by == judge else judgment.served_by


def _winner(verdict: Verdict | None, seat_a: Winner, seat_b: Winner) -> Winner:
    winners: dict[Verdict | None, Winner] = {"A": seat_a, "B": seat_b, "tie": "tie", None: "error"}
    return winners[verdict]
