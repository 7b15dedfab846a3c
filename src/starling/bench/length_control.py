r"""A win rate as it might be if both answers were equally long: an estimate under a model.

In the manner of AlpacaEval 2 (Dubois et al. 2024, Length-Controlled AlpacaEval, arXiv 2404.04475):

    logit P(win on prompt x) = model + length * tanh(d_x / sd(d)) + difficulty * g_x

where d_x is how much longer the model's answer is than the baseline's and g_x how hard the prompt
is, where that is known.  The length-controlled win rate is the mean of P with the length term at 0.
Wins may be anything from 0 to 1.  The fit minimises the log loss (nats, summed over prompts) plus
PENALTY / 2 times the squared coefficients, which keeps them finite where wins and losses part.

It is not the number of AlpacaEval's leaderboard: that one knows every instruction's difficulty from
a file of its own and is fitted beside deliberately long and short models.  It is right as far as
preference depends on length in this way; a prompt's own need for length is not in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from starling.base.errors import DataError
from starling.base.estimate import LEVEL, Estimate

PENALTY = 0.1
"""A tenth of a standard normal prior: with 100 prompts it moves a rate of 0.9 by 0.002."""

MOST_STEPS = 100
CLOSE_ENOUGH = 1e-10


@dataclass(frozen=True)
class LengthControlled:
    """The length-controlled win rate; `length` is the log odds that a far longer answer gains."""

    win_rate: Estimate
    length: float
    difficulty: float | None


def control_length(
    wins: Sequence[float],
    longer: Sequence[float],
    difficulty: Sequence[float] | None = None,
    *,
    num_failed: int = 0,
) -> LengthControlled:
    """Fit the model to each prompt's win (0 to 1) and how much longer the model's answer is.

    The interval is the normal one of the log odds, by the fit's robust ("sandwich") variance, which
    holds where the model is wrong too; of one prompt there is none.  Raises DataError where all
    answers are as much longer, and ValueError for no prompts, lists of different lengths, a win
    outside 0 to 1, and what is not finite.
    """
    won, difference = np.asarray(wins, float), np.asarray(longer, float)
    n = len(won)
    hard = np.zeros(n) if difficulty is None else np.asarray(difficulty, float)
    if not n or not len(difference) == len(hard) == n:
        raise ValueError(f"{n} wins need as many lengths ({len(difference)}) and difficulties")
    if not np.isfinite([won, difference, hard]).all() or won.min() < 0 or won.max() > 1:
        raise ValueError("wins are from 0 to 1, lengths and difficulties finite")
    if difference.any() and not difference.std():
        raise DataError(
            f"every answer is longer than the baseline's by {difference[0]:g}, so nothing tells "
            "what that earns from what the model earns; leave length control out"
        )
    design = np.stack([np.ones(n), np.tanh(difference / (difference.std() or 1.0)), hard], axis=1)
    coefficients, hessian = _fit(design, won)
    equal = design * [1.0, 0.0, 1.0]
    chances = _sigmoid(equal @ coefficients)
    rate = float(chances.mean())
    # How much each prompt moves the rate: through the coefficients, and by being among the prompts.
    slope = (equal * (chances * (1 - chances))[:, None]).mean(axis=0)
    errors = won - _sigmoid(design @ coefficients)
    moves = (design * errors[:, None]) @ np.linalg.solve(hessian, slope) + (chances - rate) / n
    interval = _interval(rate, math.sqrt((moves**2).sum())) if n > 1 else (None, None)
    return LengthControlled(
        Estimate(rate, *interval, n, num_failed),
        float(coefficients[1]),
        None if difficulty is None else float(coefficients[2]),
    )


def _fit(design: np.ndarray, won: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients [3] and the Hessian [3, 3] there: Newton's method, halving steps that go up."""

    def loss(at: np.ndarray) -> float:
        logits = design @ at
        return float((np.logaddexp(0, logits) - won * logits).sum() + PENALTY / 2 * at @ at)

    coefficients = np.zeros(design.shape[1])
    for _ in range(MOST_STEPS):
        chances = _sigmoid(design @ coefficients)
        gradient = design.T @ (chances - won) + PENALTY * coefficients
        weighted = design * (chances * (1 - chances))[:, None]
        hessian = design.T @ weighted + PENALTY * np.eye(len(coefficients))
        step = np.linalg.solve(hessian, gradient)
        if gradient @ step < CLOSE_ENOUGH:
            return coefficients, hessian
        before = loss(coefficients)
        while loss(coefficients - step) > before and np.abs(step).max() > CLOSE_ENOUGH:
            step = step / 2
        coefficients = coefficients - step
    raise ValueError("the fit does not settle; are lengths and difficulties on a sane scale?")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -logits))


def _interval(rate: float, deviation: float) -> tuple[float, float]:
    half = NormalDist().inv_cdf(0.5 + LEVEL / 2) * deviation / (rate * (1 - rate))
    odds = math.log(rate / (1 - rate))
    low, high = _sigmoid(np.array([odds - half, odds + half])).tolist()
    return low, high
