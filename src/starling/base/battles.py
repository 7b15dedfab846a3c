"""Ratings from battles of two: Elo, Bradley-Terry, win rates, and ranks from intervals.

Models are numbers from 0.  A tie, of whatever kind, is half a win for each.  What the battles do
not tell is NaN in these arrays, never a number; `why_unrated` has the reason in words.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from starling.base.estimate import LEVEL
from starling.base.rating import CONVERGED, MOST_STEPS
from starling.base.seeding import numpy_generator

START, BASE, SCALE = 1000.0, 10.0, 400.0
"""The scale of ratings, chess's: who stands SCALE points higher wins BASE times to one."""

K = 4.0
"""The most that one battle moves an Elo rating: little, as Chatbot Arena has it."""


@dataclass(frozen=True)
class Battles:
    """Who met whom and how it ended, in the order in which it did; arrays of [N].

    Example: `Battles(left=[0, 1], right=[1, 2], won=[1.0, 0.5], num_models=3)`, as arrays: the
    first model beat the second, which then tied with the third.
    """

    left: np.ndarray
    right: np.ndarray
    won: np.ndarray
    """What `left` got: 1 is a win, 0.5 a tie, 0 a loss."""
    num_models: int


def elo(battles: Battles) -> np.ndarray:
    """[num_models] ratings after all battles; each moves both sides by K times the surprise.

    The order counts, and the last battles most.  Source: Elo 1978, The Rating of Chessplayers.
    """
    ratings = [START] * battles.num_models
    rows = zip(battles.left.tolist(), battles.right.tolist(), battles.won.tolist(), strict=True)
    for left, right, won in rows:
        expected = 1 / (1 + BASE ** ((ratings[right] - ratings[left]) / SCALE))
        change = K * (won - expected)
        ratings[left] += change
        ratings[right] -= change
    return np.array(ratings)


def count_wins(battles: Battles, times: np.ndarray | None = None) -> np.ndarray:
    """[num_models, num_models] how often row beat column, ties half; each battle `times` times."""
    n, left, right = battles.num_models, battles.left, battles.right
    times = np.ones(len(left)) if times is None else times
    by_left = np.bincount(left * n + right, weights=battles.won * times, minlength=n * n)
    by_right = np.bincount(right * n + left, weights=(1 - battles.won) * times, minlength=n * n)
    return (by_left + by_right).reshape(n, n)


def resample_wins(battles: Battles, rounds: int, seed: int) -> Iterator[np.ndarray]:
    """`count_wins` of as many battles drawn with replacement, `rounds` times.

    How often each distinct battle (left, right, outcome) is drawn is drawn at once, which a million
    battles need: source FastChat, serve/monitor/rating_systems.py.
    """
    n = battles.num_models
    cells = (battles.left * n + battles.right) * 3 + (2 * battles.won).astype(int)
    distinct, counts = np.unique(cells, return_counts=True)
    pairs, halves = np.divmod(distinct, 3)
    once = Battles(pairs // n, pairs % n, halves / 2, n)
    rng = numpy_generator(seed, "ratings")
    for _ in range(rounds):
        yield count_wins(once, rng.multinomial(counts.sum(), counts / counts.sum()))


def average_win_rate(wins: np.ndarray) -> np.ndarray:
    """[num_models] shares of wins against each model that was met, averaged over those models.

    So it does not depend on how often each was met.  NaN for a model without battles.
    """
    games = wins + wins.T
    met = games > 0
    shares = np.divide(wins, games, out=np.zeros_like(wins), where=met)
    num_met = met.sum(axis=1)
    return np.divide(shares.sum(axis=1), num_met, out=np.full(len(wins), np.nan), where=num_met > 0)


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """[num_models] log-strengths of greatest likelihood, their mean 0; NaN where there are none.

    Row beats column with probability sigmoid(their difference).  Nothing holds them back, so the
    maximum is finite only among models of which each is linked to each by a chain of wins, both
    ways; the largest such group is rated.  Battles with others tell nothing about those in it: in
    the limit of the likelihood they are certain.  Source: Ford 1957, Am. Math. Monthly 64:28.
    """
    log_strengths = np.full(len(wins), np.nan)
    rated = _largest_group(wins)
    if rated.any():
        log_strengths[rated] = _most_likely(wins[np.ix_(rated, rated)])
    return log_strengths


def bradley_terry_beside(wins: np.ndarray, point: np.ndarray) -> np.ndarray:
    """`bradley_terry` of a resample among the models that `point` rates, at the same level.

    Level: the mean over the models that both rate is the same.  Else a weak model that drops out of
    one resample would seem to pull down all the others there.
    """
    rated = ~np.isnan(point)
    log_strengths = np.full(len(point), np.nan)
    log_strengths[rated] = bradley_terry(wins[np.ix_(rated, rated)])
    both = ~np.isnan(log_strengths)
    return log_strengths + point[both].sum() / max(both.sum(), 1)


def as_rating(log_strengths: np.ndarray) -> np.ndarray:
    """Log-strengths on the scale of Elo's ratings; 0 is START."""
    return START + SCALE / np.log(BASE) * log_strengths


def as_share(log_strengths: np.ndarray) -> np.ndarray:
    """Strengths that sum to 1 over the models that have one."""
    return np.exp(log_strengths - np.logaddexp.reduce(log_strengths[~np.isnan(log_strengths)]))


def percentiles(rounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends [num_models], low and high, between which LEVEL of the rounds [rounds, num_models]
    lie; of those that are known, and NaN where fewer than half are.
    """
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    known = [column[~np.isnan(column)] for column in rounds.T]
    unknown = np.array([np.nan, np.nan])
    ends = [np.quantile(k, tails) if 2 * len(k) >= len(rounds) else unknown for k in known]
    low, high = np.array(ends).T
    return low, high


def ranks_by_overlap(low: Sequence[float], high: Sequence[float]) -> list[int]:
    """Ranks: 1 and how many models are surely better, their low end above one's own high end.

    Source: the Chatbot Arena's leaderboard.
    """
    return [1 + sum(other > own for other in low) for own in high]


def why_unrated(wins: np.ndarray, log_strengths: np.ndarray) -> dict[int, str]:
    """By model, why `bradley_terry` found no finite strength for it."""
    rated = ~np.isnan(log_strengths)
    linked = _reached(wins + wins.T > 0, rated)
    reasons = {}
    for model in np.flatnonzero(~rated).tolist():
        won, lost = wins[model].sum(), wins[:, model].sum()
        if won == 0 or lost == 0:
            reasons[model] = "only wins" if won else "only losses" if lost else "no battles"
        elif rated.any() and not linked[model]:
            reasons[model] = "no battles link it to the rated models"
        else:
            reasons[model] = "its battles with the other groups all went one way"
    return reasons


def _largest_group(wins: np.ndarray) -> np.ndarray:
    """[num_models] mask of the largest group linked both ways; of two as large, more battles."""
    beats = wins > 0
    left = np.ones(len(wins), dtype=bool)
    largest, size = np.zeros(len(wins), dtype=bool), (1, 0.0)
    while left.sum() >= max(size[0], 2):
        start = np.zeros_like(left)
        start[left.argmax()] = True
        group = _reached(beats, start) & _reached(beats.T, start)
        found = (int(group.sum()), float(wins[np.ix_(group, group)].sum()))
        if found > size:
            largest, size = group, found
        left &= ~group
    return largest


def _reached(edges: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Mask of the nodes that edges (row to column) lead to from those of the mask `start`."""
    reached = start
    while True:
        grown = reached | edges[reached].any(axis=0)
        if grown.sum() == reached.sum():
            return reached
        reached = grown


def _most_likely(wins: np.ndarray) -> np.ndarray:
    """Newton's method, from equal strengths, where all models are one group.

    A step is cut where it would move two that met apart by more than 1: so far the curvature
    changes at most e-fold, and every step is upwards.  Source: Bach 2010, EJS 4:384.
    """
    games = wins + wins.T
    log_strengths = np.zeros(len(wins))
    for _ in range(MOST_STEPS):
        # [row, column] the probability that row loses.
        loses = np.exp(-np.logaddexp(0, log_strengths[:, None] - log_strengths))
        unexpected = wins * loses
        weights = games * loses * loses.T
        curvature = np.diag(weights.sum(axis=1)) - weights
        # A shift of all changes nothing; the constant keeps the matrix regular and the shift at 0.
        step = np.linalg.solve(curvature + weights.mean(), (unexpected - unexpected.T).sum(axis=1))
        largest = np.abs(step[:, None] - step)[games > 0].max()
        log_strengths += step / max(1.0, largest)
        if largest < CONVERGED:
            return log_strengths - log_strengths.mean()
    raise ValueError(f"no strengths after {MOST_STEPS} steps")
