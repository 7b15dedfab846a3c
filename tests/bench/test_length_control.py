"""The length-controlled win rate on worlds whose dependence on length is known."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize

from starling.base.errors import DataError
from starling.bench.length_control import PENALTY, control_length


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def world(seed, *, model, length, shift, n=805, hard=0.0):
    """Wins, length differences and difficulties drawn from the documented model."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(shift, 400, n)
    difficulty = rng.normal(0, 1, n)
    chances = sigmoid(model + length * np.tanh(longer / longer.std()) + hard * difficulty)
    return (rng.random(n) < chances).astype(float), longer, difficulty


def fitted(wins, longer, difficulty=None):
    hard = None if difficulty is None else difficulty.tolist()
    return control_length(wins.tolist(), longer.tolist(), hard)


def covers(estimate, truth):
    return estimate.low <= truth <= estimate.high


def test_the_rate_without_length_is_recovered_where_the_raw_one_is_far_off():
    truth = sigmoid(-0.5)
    found, raw = [], []
    for seed in range(60):
        wins, longer, _ = world(seed, model=-0.5, length=2.0, shift=600)
        found.append(fitted(wins, longer))
        raw.append(wins.mean())
    assert np.mean([each.win_rate.mean for each in found]) == pytest.approx(truth, abs=0.01)
    assert np.mean(raw) - truth > 0.3
    # 95 % of 60 is 57; below 52 has a chance of one in two hundred.
    assert sum(covers(each.win_rate, truth) for each in found) >= 52
    assert np.mean([each.length for each in found]) == pytest.approx(2.0, abs=0.1)


def test_where_length_earns_nothing_it_agrees_with_the_raw_rate():
    for seed in range(20):
        wins, longer, _ = world(seed, model=0.4, length=0.0, shift=300)
        found = fitted(wins, longer)
        assert found.win_rate.mean == pytest.approx(wins.mean(), abs=0.06)
        assert covers(found.win_rate, wins.mean())


def test_intervals_are_as_wide_as_the_rates_vary():
    rates, widths = [], []
    for seed in range(150):
        wins, longer, _ = world(seed, model=0.3, length=1.0, shift=300, n=300)
        estimate = fitted(wins, longer).win_rate
        rates.append(estimate.mean)
        widths.append(estimate.high - estimate.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(rates), rel=0.15)


def test_intervals_know_that_other_prompts_would_be_harder_or_easier():
    rates, widths = [], []
    for seed in range(150):
        wins, longer, difficulty = world(seed, model=0.3, length=1.0, shift=0, n=300, hard=4.0)
        estimate = fitted(wins, longer, difficulty).win_rate
        rates.append(estimate.mean)
        widths.append(estimate.high - estimate.low)
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(rates), rel=0.15)


def test_known_difficulty_is_a_term_of_its_own_and_stays_in_the_rate():
    wins, longer, difficulty = world(3, model=0.5, length=1.5, shift=300, n=6000, hard=1.0)
    found = fitted(wins, longer, difficulty)
    truth = sigmoid(0.5 + difficulty).mean()
    assert found.win_rate.mean == pytest.approx(truth, abs=0.02)
    assert covers(found.win_rate, truth)
    assert found.difficulty == pytest.approx(1.0, abs=0.1)
    assert fitted(wins, longer).difficulty is None


def test_the_fit_is_the_minimum_that_another_optimiser_finds_with_soft_wins():
    rng = np.random.default_rng(1)
    longer, difficulty, wins = rng.normal(50, 90, 40), rng.normal(size=40), rng.random(40)
    design = np.stack([np.ones(40), np.tanh(longer / np.std(longer)), difficulty], axis=1)

    def loss(at):
        chances = sigmoid(design @ at)
        entropy = wins * np.log(chances) + (1 - wins) * np.log(1 - chances)
        return -entropy.sum() + PENALTY / 2 * (at**2).sum()

    best = minimize(loss, np.zeros(3), tol=1e-12).x
    found = fitted(wins, longer, difficulty)
    assert (found.length, found.difficulty) == pytest.approx(tuple(best[1:]), abs=1e-4)
    equal = sigmoid(best[0] + best[2] * difficulty).mean()
    assert found.win_rate.mean == pytest.approx(equal, abs=1e-5)


@pytest.mark.parametrize(
    ("wins", "longer", "rate"),
    [
        ([1.0] * 50, [float(n - 25) for n in range(50)], 0.99),
        ([0.0] * 805, [1e9 * (n - 400) for n in range(805)], 0.0),
        # The longer one always wins, so at equal length nobody does.
        ([1.0, 0.0] * 25, [5.0, -5.0] * 25, 0.5),
        ([1.0, 0.5, 0.0], [0.0, 0.0, 0.0], 0.5),
    ],
)
def test_what_length_or_nothing_parts_completely_has_a_finite_fit(wins, longer, rate):
    found = control_length(wins, longer)
    assert found.win_rate.mean == pytest.approx(rate, abs=0.01)
    assert math.isfinite(found.length)
    assert 0 <= found.win_rate.low <= found.win_rate.mean <= found.win_rate.high <= 1


def test_a_single_prompt_has_no_interval_and_failures_are_carried():
    estimate = control_length([0.7], [0.0], num_failed=3).win_rate
    assert (estimate.low, estimate.high, estimate.n, estimate.num_failed) == (None, None, 1, 3)


def test_answers_that_are_all_as_much_longer_tell_nothing():
    with pytest.raises(DataError, match="longer than the baseline's by 7.*leave length control"):
        control_length([1.0, 0.0, 1.0], [7.0, 7.0, 7.0])


@pytest.mark.parametrize(
    ("wins", "longer", "difficulty"),
    [
        ([], [], None),
        ([1.0], [1.0, 2.0], None),
        ([1.0, 0.0], [1.0, 2.0], [1.0]),
        ([1.5, 0.0], [1.0, 2.0], None),
        ([-0.5, 0.0], [1.0, 2.0], None),
        ([1.0, 0.0], [math.nan, 2.0], None),
        ([1.0, 0.0], [1.0, 2.0], [math.inf, 0.0]),
    ],
)
def test_what_is_no_data_is_refused(wins, longer, difficulty):
    with pytest.raises(ValueError, match=r"wins need as many|from 0 to 1"):
        control_length(wins, longer, difficulty)
