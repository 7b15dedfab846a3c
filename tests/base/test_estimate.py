import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from starling.base.estimate import MOST_RESAMPLED, Estimate, bootstrap_mean, mean_of_sums


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


def test_the_same_seed_gives_the_same_interval_and_another_a_near_one():
    values = np.random.default_rng(0).normal(size=50).tolist()
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)


def test_more_clusters_than_fit_in_one_block_are_all_drawn():
    values = [0.0, 1.0] * 1000
    estimate = bootstrap_mean(values, seed=0)
    half = 1.96 * 0.5 / math.sqrt(2000)
    assert estimate.low == pytest.approx(0.5 - half, abs=0.12 * half)
    assert estimate.high == pytest.approx(0.5 + half, abs=0.12 * half)


def ragged_clusters(num_clusters):
    """Values whose clusters have an effect of their own, and sizes 1 to 7."""
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 8, size=num_clusters)
    clusters = np.repeat(np.arange(num_clusters), sizes)
    return rng.normal(size=num_clusters)[clusters] + rng.normal(size=len(clusters)), clusters


def test_with_many_clusters_the_normal_interval_is_the_bootstraps():
    values, clusters = ragged_clusters(MOST_RESAMPLED + 1)
    found = bootstrap_mean(values.tolist(), seed=0, clusters=clusters.tolist())
    sums, sizes = np.bincount(clusters, weights=values), np.bincount(clusters)
    drawn = np.random.default_rng(2).integers(len(sums), size=(4000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    half = (high - low) / 2
    assert found.mean == pytest.approx(values.mean())
    # The ends of 4000 rounds vary by about 2 % of the half-width each; three of them.
    assert found.low == pytest.approx(low, abs=0.06 * half)
    assert found.high == pytest.approx(high, abs=0.06 * half)
    assert found.high - found.low == pytest.approx(high - low, rel=0.05)
    # No seed is needed for it.
    assert found == bootstrap_mean(values.tolist(), seed=5, clusters=clusters.tolist())


def test_a_share_of_many_clusters_stays_between_nought_and_one():
    values = [1.0] + [0.0] * MOST_RESAMPLED
    estimate = bootstrap_mean(values, seed=0)
    assert estimate.low == 0.0
    assert bootstrap_mean([1 - value for value in values], seed=0).high == 1.0


@pytest.mark.parametrize("k", [3, 7])
def test_rounding_takes_no_share_out_of_its_range(k):
    for n in range(2, 40):
        # One cluster of k values holds a 1: in some resamples none does, but for rounding.
        sums, sizes = [1.0] + [0.0] * n, [k] * (n + 1)
        values = [1.0] + [0.0] * (k * (n + 1) - 1)
        clusters = [index // k for index in range(len(values))]
        lows = mean_of_sums(sums, sizes, seed=0), bootstrap_mean(values, seed=0, clusters=clusters)
        assert all(0 <= each.low < 1e-9 for each in lows)
        sums, values = [k - each for each in sums], [1 - each for each in values]
        highs = mean_of_sums(sums, sizes, seed=0), bootstrap_mean(values, seed=0, clusters=clusters)
        assert all(1 - 1e-9 < each.high <= 1 for each in highs)


@pytest.mark.parametrize("num_clusters", [2, 40, MOST_RESAMPLED + 1])
def test_sums_by_cluster_give_what_the_values_themselves_give(num_clusters):
    values, clusters = ragged_clusters(num_clusters)
    expected = bootstrap_mean(values.tolist(), seed=3, clusters=clusters.tolist())
    sums, sizes = np.bincount(clusters, weights=values), np.bincount(clusters)
    found = mean_of_sums(sums.tolist(), sizes.tolist(), seed=3)
    assert (found.n, found.num_failed) == (expected.n, 0)
    assert mean_of_sums(sums.tolist(), sizes.tolist(), seed=3, num_failed=2).num_failed == 2
    for end in ("mean", "low", "high"):
        assert getattr(found, end) == pytest.approx(getattr(expected, end))


@pytest.mark.parametrize(("sums", "sizes"), [([], []), ([1.0], [0]), ([1.0, 2.0], [1])])
def test_sums_without_values_have_no_mean(sums, sizes):
    with pytest.raises(ValueError, match="at least 1"):
        mean_of_sums(sums, sizes, seed=0)


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


def test_an_estimate_is_written_for_people():
    assert str(Estimate(0.5, 0.0, 1.0, n=2)) == "0.50 [0.00, 1.00] n=2"
    assert str(Estimate(0.5, 0.0, 1.0, n=2, num_failed=3)) == "0.50 [0.00, 1.00] n=2 failed=3"
    assert str(Estimate(2.0, None, None, n=1)) == "2.00 [unknown] n=1"
