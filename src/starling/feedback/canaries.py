"""Cheating answers among the candidates', to see whether the judge lets them win.

Each takes the place of the answer that came last, in a question of its own that no ranking uses.
"""

from collections.abc import Sequence
from dataclasses import replace

from starling.base.seeding import permutation
from starling.data.records import Prompt
from starling.judging.canaries import best_ranking, canary_text
from starling.judging.judge import Comparison, Ranking

KINDS = ("null model", "bare ranking", "rank me first", "forged verdict")


def draw_canaries(prompts: Sequence[Prompt], most: int, seed: int) -> dict[str, str]:
    """The kind of canary by prompt id: at most one prompt in ten, every kind as often."""
    number = min(most, len(prompts) // 10)
    drawn = permutation(len(prompts), seed, "feedback/canaries", 0)[:number]
    return {prompts[index].id: KINDS[n % len(KINDS)] for n, index in enumerate(drawn)}


def with_canary(asked: Comparison, ranking: Ranking, kind: str) -> tuple[Comparison, int]:
    """The comparison with a canary in the place of its last answer, and which answer that was."""
    index = ranking.ranks.index(max(ranking.ranks))
    answers = list(asked.answers)
    answers[index] = canary_text(kind, best_ranking(len(answers)))
    finished = None
    if asked.finished is not None:
        finished = (*asked.finished[:index], True, *asked.finished[index + 1 :])
    cheated = replace(asked, id=f"{asked.id}/canary", answers=tuple(answers), finished=finished)
    return cheated, index
