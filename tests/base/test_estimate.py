import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.base.estimate import Estimate, bootstrap_mean


def test_the_interval_of_many_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    estimate = bootstrap_mean(values.tolist(), seed=1)
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.mean == pytest.approx(values.mean(), rel=1e-12)
    # An end of 2000 rounds has a standard error of 0.06 of the mean's own, 3 % of `half`; four.
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.12 * half)
    assert estimate.n == 400


def test_two_values_have_the_interval_worked_out_by_hand():
    # Resamples of (0, 1): means 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_mean([0.0, 1.0], seed=0) == Estimate(0.5, 0.0, 1.0, n=2)


def test_clusters_are_drawn_whole_and_weigh_by_their_size():
    # Clusters a (0, 0, 0) and b (1): resamples aa, ab, bb have means 0, 1/4, 1.
    estimate = bootstrap_mean([0.0, 0.0, 1.0, 0.0], seed=0, clusters=["a", "a", "b", "a"])
    assert estimate == Estimate(0.25, 0.0, 1.0, n=4)
    # Ten clusters of one answer, one of ninety: absent from (10/11)^11 = 35 % of resamples.
    clusters = [min(number, 10) for number in range(100)]
    uneven = bootstrap_mean([0.0] * 10 + [1.0] * 90, seed=0, clusters=clusters)
    assert (uneven.mean, uneven.low) == (0.9, 0.0)


def test_repeating_every_answer_does_not_make_the_interval_narrower():
    values = np.random.default_rng(0).normal(size=100)
    single = bootstrap_mean(values.tolist(), seed=0)
    repeated = bootstrap_mean(
        np.repeat(values, 9).tolist(), seed=0, clusters=[i // 9 for i in range(900)]
    )
    assert repeated.low == pytest.approx(single.low)
    assert repeated.high == pytest.approx(single.high)
    assert repeated.n == 900


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        prompt_effects = np.repeat(rng.normal(size=40), 3)
        values = prompt_effects + rng.normal(size=120)
        estimate = bootstrap_mean(
            values.tolist(), seed=trial, clusters=[i // 3 for i in range(120)]
        )
        hits += estimate.low <= 0 <= estimate.high
    # 95 % of 200 is 190, standard deviation 3.1. Ignoring the clusters covers about 80 %: 160.
    assert 178 <= hits <= 199


@settings(deadline=None)
@given(value=st.floats(-1e6, 1e6), n=st.integers(2, 30))
def test_equal_values_have_an_interval_of_that_value(value, n):
    estimate = bootstrap_mean([value] * n, seed=0)
    assert estimate.mean == pytest.approx(value)
    assert estimate.low == pytest.approx(estimate.mean)
    assert estimate.high == pytest.approx(estimate.mean)


@pytest.mark.parametrize(("values", "clusters"), [([2.0], None), ([1.0, 3.0], ["p", "p"])])
def test_one_cluster_says_nothing_about_its_spread(values, clusters):
    estimate = bootstrap_mean(values, seed=0, clusters=clusters)
    assert estimate == Estimate(2.0, None, None, n=len(values))
    assert str(estimate) == f"2.00 [unknown] n={len(values)}"


def test_the_same_seed_gives_the_same_interval_and_another_a_near_one():
    values = np.random.default_rng(0).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_more_clusters_than_fit_in_one_block_are_all_drawn():
    values = [0.0, 1.0] * 2000
    estimate = bootstrap_mean(values, seed=0)
    half = 1.96 * 0.5 / math.sqrt(4000)
    assert estimate.low == pytest.approx(0.5 - half, abs=0.12 * half)
    assert estimate.high == pytest.approx(0.5 + half, abs=0.12 * half)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one value"),
        ([1.0, math.nan], {}, "finite, found nan"),
        ([1.0, -math.inf], {}, "finite, found -inf"),
        ([1.0, 2.0], {"clusters": ["a"]}, "2 values but 1 cluster names"),
    ],
)
def test_what_has_no_mean_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, seed=0, **options)


def test_a_table_is_refused():
    # A ValueError by itself, a TypeError where jaxtyping checks calls.
    with pytest.raises((ValueError, TypeError)):
        bootstrap_mean([[1.0, 2.0]], seed=0)


def test_whole_numbers_are_values_too():
    assert bootstrap_mean([0, 1], seed=0) == Estimate(0.5, 0.0, 1.0, n=2)


def test_failures_are_carried_along_and_shown():
    estimate = bootstrap_mean([0.0, 1.0], seed=0, num_failed=3)
    assert estimate == Estimate(0.5, 0.0, 1.0, n=2, num_failed=3)
    assert str(estimate) == "0.50 [0.00, 1.00] n=2 failed=3"
    assert str(bootstrap_mean([0.0, 1.0], seed=0)) == "0.50 [0.00, 1.00] n=2"
