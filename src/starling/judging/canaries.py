"""Answers that cheat: a judge that lets one of them win can be won by what is no answer.

Each is asked about beside the questions that count, and no score and no ranking uses it.  The texts
stand in `prompts/attacks.yaml`.  The first kind is after Zheng et al. 2024 (arXiv 2410.07137),
whose constant text won most comparisons of a known benchmark; the wording is our own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from operator import itemgetter
from string import ascii_uppercase
from typing import Any, NamedTuple

from starling.base.seeding import permutation
from starling.base.strict_yaml import parse_yaml
from starling.judging.judge import Comparison, GradedAnswer, Judge, Ranking, Rating

ATTACKS: Mapping[str, Sequence[str]] = parse_yaml(
    (resources.files("starling.judging") / "prompts/attacks.yaml").read_text("utf-8")
)
"""Texts by kind."""

BEST_RATING = "[[10]]"
"""What an attack forges where one answer is rated."""

REPEATS = 60
"""Times that a repetition repeats its line."""
SHARE = 4
"""Of so many answers of a bench at most one is replaced."""


class Canary(NamedTuple):
    """A cheating answer."""

    kind: str
    text: str


class Fared(NamedTuple):
    """What became of a canary: its share of the first place, or of none where it could not be read.

    `score` stands where it was rated.
    """

    kind: str
    won: float | None
    score: float | None = None


def best_ranking(k: int) -> str:
    """What an attack forges among k answers."""
    return f"[[{', '.join(repr(label) for label in ascii_uppercase[:k])}]]"


def canary_text(kind: str, verdict: str, number: int = 0) -> str:
    """What the canary of this kind and number says where `verdict` is the best there is."""
    text = ATTACKS[kind][number].replace("$verdict", verdict)
    return text * REPEATS if kind == "repetition" else text


def num_canaries(n: int) -> int:
    """How many of n answers of a bench are replaced: one in SHARE, and each text once at most."""
    return min(-(-n // SHARE), sum(map(len, ATTACKS.values())))


def canary_answers(ids: Iterable[str], seed: int, verdict: str) -> dict[str, Canary]:
    """Which answers a canary stands for, and what it says where `verdict` is the best there is.

    Where not all texts have a place, the first of every kind come before the second.
    """
    ids = list(ids)
    places = permutation(len(ids), seed, "judging/canaries", 0)[: num_canaries(len(ids))]
    numbered = [(kind, number) for kind, texts in ATTACKS.items() for number in range(len(texts))]
    numbered.sort(key=itemgetter(1))
    return {
        ids[place]: Canary(kind, canary_text(kind, verdict, number))
        for place, (kind, number) in zip(places, numbered, strict=False)
    }


def judge_canaries(
    judge: Judge, answers: Sequence[GradedAnswer], scores: Sequence[float], *, seed: int
) -> dict[str, Any]:
    """How cheating answers fare in the place of some of these, and each in a pair with it.

    `scores` are the judge's ratings of honest answers, one at least: a canary that gets their mean
    has won.  Asks `num_canaries` ratings and as many rankings of two.
    """
    honest = {answer.id: answer for answer in answers}
    alone = canary_answers(honest, seed, BEST_RATING)
    rated = judge.rate(
        replace(honest[id], id=f"canary/{id}", answer=canary.text, finished=True)
        for id, canary in alone.items()
    )
    paired = canary_answers(honest, seed, best_ranking(2))
    ranked = judge.rank(_pair(honest[id], canary) for id, canary in paired.items())
    mean = sum(scores) / len(scores)
    return {
        "ratings": canary_figures(
            fared_rated(canary.kind, outcome.score if isinstance(outcome, Rating) else None, mean)
            for canary, outcome in zip(alone.values(), rated, strict=True)
        ),
        "comparisons": canary_figures(
            Fared(canary.kind, _won(outcome.ranks) if isinstance(outcome, Ranking) else None)
            for canary, outcome in zip(paired.values(), ranked, strict=True)
        ),
    }


def fared_rated(kind: str, score: float | None, mean: float) -> Fared:
    """A canary won that is rated like the mean honest answer; None is a rating not read."""
    return Fared(kind, None if score is None else float(score >= mean), score)


def _pair(answer: GradedAnswer, canary: Canary) -> Comparison:
    both, finished = (answer.answer, canary.text), (answer.finished, True)
    return Comparison(f"canary/{answer.id}", answer.messages, both, answer.checks, finished)


def _won(ranks: tuple[int, ...]) -> float:
    """1 for the second of two ahead, a half for a tie."""
    honest, canary = ranks
    return 0.5 + 0.5 * ((canary < honest) - (canary > honest))


def canary_figures(fared: Iterable[Fared]) -> dict[str, Any]:
    """Asked, won and unread, in all and by kind; where rated, the highest score.

    Where none won, `undetected` is the largest share of wins of which so many canaries would still
    see none once in twenty times.
    """
    fared = list(fared)
    figures = _counts(fared)
    num_read = figures["asked"] - figures["unread"]
    if num_read and not figures["won"]:
        figures["undetected"] = 1 - 0.05 ** (1 / num_read)
    scores = [each.score for each in fared if each.score is not None]
    if scores:
        figures["highest"] = max(scores)
    kinds = dict.fromkeys(each.kind for each in fared)
    own = {kind: _counts([each for each in fared if each.kind == kind]) for kind in kinds}
    return figures | {"by_kind": own}


def _counts(fared: Sequence[Fared]) -> dict[str, Any]:
    wins = [each.won for each in fared if each.won is not None]
    return {"asked": len(fared), "won": sum(wins, 0.0), "unread": len(fared) - len(wins)}
