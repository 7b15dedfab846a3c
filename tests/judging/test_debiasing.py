"""What shuffling, pairs and repeats take out of a judge whose faults are known.

The figures stand in docs/judging.md; the margins are four standard errors and more of 200 prompts
(0.023 for a slope).
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "benchmarks/debiasing.py"
NUM_PROMPTS = 200


@pytest.fixture(scope="module")
def debiasing():
    spec = importlib.util.spec_from_file_location("debiasing", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["debiasing"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["debiasing"]


@pytest.fixture(scope="module")
def measured(debiasing):
    return cache(lambda name: debiasing.measure(name, NUM_PROMPTS))


def test_without_shuffling_the_place_decides_and_without_pairs_even_more(measured):
    assert measured("kwise, not shuffled, no pairs").slope > 0.4
    assert measured("kwise, not shuffled").slope > 0.17
    assert measured("kwise, not shuffled, no pairs").won[0] > 0.25
    assert measured("kwise, not shuffled, no pairs").won[-1] < 0.07


def test_a_judge_without_a_preference_for_places_shows_none(debiasing):
    fair = debiasing.measure(
        "kwise, not shuffled, no pairs", NUM_PROMPTS, debiasing.SimulatedJudge(place=0.0)
    )
    assert abs(fair.slope) < 0.1


@pytest.mark.parametrize("name", ["kwise", "kwise-repeated, 3", "pairwise", "pointwise"])
def test_every_strategy_takes_four_fifths_of_the_systematic_bias_out(measured, name):
    planted = measured("kwise, not shuffled, no pairs").slope
    assert abs(measured(name).slope) < 0.2 * planted


def test_pairs_make_better_rankings_and_repeats_better_ones_still(measured):
    # At 1000 prompts 0.727, 0.767, 0.801; both differences are of the same prompts.
    assert measured("kwise").accuracy > measured("kwise, no pairs").accuracy + 0.015
    assert measured("kwise-repeated, 3").accuracy > measured("kwise").accuracy + 0.015


def test_shuffling_alone_makes_noise_of_the_bias_and_no_better_rankings(measured):
    assert abs(measured("kwise").accuracy - measured("kwise, not shuffled").accuracy) < 0.03


def test_pairs_shown_alone_do_better_if_their_bias_is_that_of_neighbours(measured):
    # At 1000 prompts 0.796 and 0.809 of the pairs right, 10 % and 6 % tied.
    whole, sixth = measured("pairwise"), measured("pairwise, a sixth of the bias")
    assert sixth.accuracy > whole.accuracy
    assert sixth.tied < whole.tied
    assert abs(sixth.slope) < 0.1


def test_ratings_that_crowd_tie_most_pairs(measured):
    assert measured("pointwise").tied > 0.5
    assert measured("pointwise").accuracy < measured("kwise").accuracy - 0.05


@pytest.mark.parametrize("name", ["kwise", "kwise-repeated, 3", "pairwise"])
def test_no_strategy_takes_the_preference_for_length_out(measured, debiasing, name):
    assert measured(name).longer > 0.535
    fair = debiasing.measure(name, 50, debiasing.SimulatedJudge(length=0.0))
    assert fair.longer < measured(name).longer


@pytest.mark.parametrize(
    ("name", "calls"), [("kwise", 1), ("kwise-repeated, 3", 3), ("pairwise", 42), ("pointwise", 7)]
)
def test_what_it_costs_in_calls(measured, name, calls):
    assert measured(name).calls == calls
