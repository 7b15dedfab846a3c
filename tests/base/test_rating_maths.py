"""Strengths and agreement against other people's solvers, hand values and what must not matter."""

import random
from itertools import combinations

import choix
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from starling.base.rating import kendall_w, plackett_luce, ranks_from

K = 5
# Rankings of some of five items, ties included: {item: rank}.
RANKINGS = st.lists(
    st.dictionaries(st.integers(0, K - 1), st.integers(1, 4), min_size=2), min_size=1, max_size=6
)
VALUES = st.lists(st.integers(0, 4), min_size=3, max_size=7)


def shuffled(rng, items):
    return rng.sample(list(items), len(items))


@pytest.mark.parametrize("prior", [0.01, 0.1, 2.0])
def test_strengths_of_partial_rankings_are_those_of_another_solver(prior):
    rng = random.Random(3)
    orders = [shuffled(rng, rng.sample(range(K), rng.randint(2, K))) for _ in range(12)]
    theirs = np.exp(choix.mm_rankings(K, orders, alpha=prior, tol=1e-13, max_iter=1_000_000))
    ours = plackett_luce(
        [{item: rank for rank, item in enumerate(o)} for o in orders], K, prior=prior
    )
    np.testing.assert_allclose(ours, theirs * K / theirs.sum(), rtol=1e-7)


def test_of_two_items_at_a_time_they_are_bradley_terry():
    rng = random.Random(4)
    won = [tuple(shuffled(rng, pair)) for pair in combinations(range(K), 2) for _ in range(5)]
    theirs = np.exp(choix.mm_pairwise(K, won, alpha=0.1, tol=1e-13, max_iter=1_000_000))
    ours = plackett_luce([{winner: 1, loser: 2} for winner, loser in won], K)
    np.testing.assert_allclose(ours, theirs * K / theirs.sum(), rtol=1e-7)


def test_three_wins_to_one_with_hardly_a_prior_are_three_to_one():
    ours = plackett_luce([{0: 1, 1: 2}] * 3 + [{0: 2, 1: 1}], 2, prior=1e-5)
    assert ours[0] / ours[1] == pytest.approx(3, rel=1e-4)


@given(RANKINGS, st.floats(0.05, 2.0))
def test_the_gradient_of_the_likelihood_and_the_prior_is_zero_at_the_strengths(rankings, prior):
    # Typed from the formula: each tied item is drawn from all that no better item has left.
    strengths = plackett_luce(rankings, K, prior=prior)
    assert strengths.mean() == pytest.approx(1)
    gradient = prior - prior * strengths
    for ranking in rankings:
        for drawn, rank in ranking.items():
            left = [item for item, other in ranking.items() if other >= rank]
            gradient[drawn] += 1
            for item in left:
                gradient[item] -= strengths[item] / sum(strengths[i] for i in left)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@given(RANKINGS, st.permutations(range(K)))
def test_other_numbers_for_the_items_are_other_places_for_the_strengths(rankings, number):
    renumbered = [{number[item]: rank for item, rank in each.items()} for each in rankings]
    moved = plackett_luce(renumbered, K)
    np.testing.assert_allclose(moved[list(number)], plackett_luce(rankings, K), rtol=1e-6)


@given(RANKINGS)
def test_twice_the_rankings_with_twice_the_prior_are_the_same_strengths(rankings):
    np.testing.assert_allclose(
        plackett_luce(rankings * 2, K, prior=0.6), plackett_luce(rankings, K, prior=0.3), rtol=1e-6
    )


def test_a_tie_says_what_one_win_each_way_says():
    rest = [{0: 1, 2: 2}, {1: 1, 2: 2}, {0: 1, 1: 2}]
    np.testing.assert_allclose(
        plackett_luce([*rest, {0: 1, 1: 1}], 3),
        plackett_luce([*rest, {0: 1, 1: 2}, {1: 1, 0: 2}], 3),
        rtol=1e-9,
    )


@pytest.mark.parametrize("votes", [1, 3, 30])
@pytest.mark.parametrize("k", [2, 7, 26])
def test_votes_that_all_agree_come_to_their_order(votes, k):
    order = dict(enumerate(range(k)))
    assert list(np.argsort(-plackett_luce([order] * votes, k))) == list(range(k))
    pairs = [{one: 1, other: 2} for one, other in combinations(range(k), 2)]
    assert list(np.argsort(-plackett_luce(pairs, k))) == list(range(k))


def test_who_was_never_ranked_has_the_mean_strength():
    assert plackett_luce([{0: 1, 1: 2}], 3)[2] == pytest.approx(1)
    np.testing.assert_allclose(plackett_luce([], 3), 1)


def test_a_prior_that_settles_nothing_is_refused():
    with pytest.raises(ValueError, match="prior"):
        plackett_luce([{0: 1, 1: 2}], 2, prior=0.0)


@given(st.lists(st.integers(-3, 3), max_size=8))
def test_ranks_are_dense_and_the_highest_is_first(values):
    assert list(ranks_from(values)) == stats.rankdata([-v for v in values], method="dense").tolist()


def test_values_within_the_tolerance_tie():
    assert ranks_from([0.5, 0.5 + 1e-9, 0.2], tolerance=1e-6) == (1, 1, 2)
    assert ranks_from([0.5, 0.5 + 1e-9, 0.2]) == (2, 1, 3)


@given(st.lists(st.permutations(range(6)), min_size=3, max_size=5))
def test_w_is_friedmans_statistic_over_its_most(rankings):
    # chi2 = m (n - 1) W; Conover 1999, Practical Nonparametric Statistics, section 5.8.
    chi2 = stats.friedmanchisquare(*np.array(rankings).T).statistic
    assert kendall_w(rankings) == pytest.approx(chi2 / (len(rankings) * 5))


@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=3, max_size=5))
def test_w_with_ties_is_friedmans_too(rankings):
    if all(len(set(each)) == 1 for each in rankings):
        assert kendall_w(rankings) is None
        return
    chi2 = stats.friedmanchisquare(*np.array(rankings).T).statistic
    assert kendall_w(rankings) == pytest.approx(chi2 / (len(rankings) * 4))


def test_two_that_agree_have_w_of_one_and_two_opposites_of_zero():
    assert kendall_w([(1, 2, 3), (1, 2, 3)]) == 1
    assert kendall_w([(1, 2, 3), (3, 2, 1)]) == 0
    assert kendall_w([(1, 2, 3)]) is None
