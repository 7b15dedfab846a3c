"""Strengths from rankings, ranks from strengths, and how far rankings agree.

A ranking maps items (0, 1, ...) to numbers, lower is better, equal is tied; it may leave items out.
Two items at a time make it Bradley-Terry.  Left out: standard errors.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

PRIOR = 0.1
"""Weight of the prior beside one win: small, so that it decides only what the data leave open."""
CONVERGED = 1e-8
"""The last step: Newton's error after it is about its square."""
MOST_STEPS = 1000


def plackett_luce(
    rankings: Iterable[Mapping[int, float]], num_items: int, *, prior: float = PRIOR
) -> np.ndarray:
    """[num_items] strengths > 0, with mean 1: their most probable values given the rankings.

    Each place is a draw among those not yet placed, with probabilities in proportion to strength.
    Tied items follow Breslow's likelihood: each is drawn from all that are left, itself and its
    equals included; so a tie of two says what one win each way says.  The prior on every strength
    is Gamma(1 + prior, prior), its mode at 1, under which the maximum exists and is unique for any
    data.  By Newton's method on log-strengths, where the likelihood is concave: where all rankings
    agree, the usual MM iteration takes thousands of rounds.

    Source: Hunter 2004, Annals of Statistics 32:384 (the model, and both methods); Caron and Doucet
    2012, JCGS 21:174 (the prior).
    """
    if prior <= 0:
        raise ValueError(f"prior must be above 0, found {prior}")
    times, wins = _draws(rankings, num_items)
    among = np.array([[i in left for i in range(num_items)] for left in times], dtype=float)
    among = among.reshape(-1, num_items)
    counts = np.array(list(times.values()), dtype=float)
    log_strengths = np.zeros(num_items)
    for _ in range(MOST_STEPS):
        strengths = np.exp(log_strengths)
        shares = among * strengths
        shares /= shares.sum(axis=1, keepdims=True)
        expected = counts @ shares + prior * strengths
        curvature = np.diag(expected) - (shares.T * counts) @ shares
        step = np.linalg.solve(curvature, wins + prior - expected)
        # Only the prior says how large all are together, and it says a mean of 1.
        step -= step.mean()
        # At most e-fold at a time: the curvature further off is another.
        log_strengths += step / max(1.0, np.abs(step).max())
        log_strengths -= np.log(np.exp(log_strengths).mean())
        if np.abs(step).max() < CONVERGED:
            return np.exp(log_strengths)
    raise ValueError(f"no strengths after {MOST_STEPS} steps; the prior of {prior} is too weak")


def _draws(
    rankings: Iterable[Mapping[int, float]], num_items: int
) -> tuple[Counter[frozenset[int]], np.ndarray]:
    """How often was drawn from each set of items left, and how often each item was drawn."""
    times: Counter[frozenset[int]] = Counter()
    wins = np.zeros(num_items)
    for ranking in rankings:
        for item, rank in ranking.items():
            left = frozenset(other for other in ranking if ranking[other] >= rank)
            # The last one left is drawn whatever its strength.
            if len(left) > 1:
                times[left] += 1
                wins[item] += 1
    return times, wins


def ranks_from(values: Sequence[float], *, tolerance: float = 0.0) -> tuple[int, ...]:
    """Dense ranks (1, 2, 2, 3), the highest value first; `tolerance` apart or closer is a tie."""
    rank, previous = 0, float("inf")
    ranks = [0] * len(values)
    for index in sorted(range(len(values)), key=lambda index: -values[index]):
        rank += previous - values[index] > tolerance
        ranks[index], previous = rank, values[index]
    return tuple(ranks)


def kendall_w(rankings: Sequence[Sequence[float]]) -> float | None:
    """Agreement of m rankings of the same n items, 0 (none) to 1 (all alike), ties corrected.

    None with fewer than two rankings, or where all of them tie everything.  Source: Kendall and
    Gibbons 1990, Rank Correlation Methods, chapter 6.
    """
    m = len(rankings)
    if m < 2:
        return None
    n = len(rankings[0])
    mean_ranks = np.array([[_mean_rank(value, each) for value in each] for each in rankings])
    deviations = mean_ranks.sum(axis=0) - m * (n + 1) / 2
    ties = sum(count**3 - count for each in rankings for count in _counts(each))
    most = m * m * (n**3 - n) - m * ties
    return float(12 * (deviations**2).sum() / most) if most else None


def _mean_rank(value: float, values: Sequence[float]) -> float:
    """The value's rank, where equal values share the mean of their places."""
    below = sum(other < value for other in values)
    return below + (sum(other == value for other in values) + 1) / 2


def _counts(values: Sequence[float]) -> list[int]:
    return [list(values).count(value) for value in set(values)]
