"""Elo, Bradley-Terry, win rates, ranks: by hand, by formula, by a solver, by golden files."""

import csv
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from starling.base.battles import (
    Battles,
    as_rating,
    as_share,
    average_win_rate,
    bradley_terry,
    bradley_terry_beside,
    count_wins,
    elo,
    percentiles,
    ranks_by_overlap,
    resample_wins,
    why_unrated,
)
from starling.data.votes import read_votes


def battles(*rows, num_models=None):
    """From (left, right, won) rows."""
    left, right, won = zip(*rows, strict=True)
    size = num_models or 1 + max(*left, *right)
    return Battles(np.array(left), np.array(right), np.array(won, dtype=float), size)


def test_one_win_between_equals_moves_both_by_half_of_k():
    assert elo(battles((0, 1, 1.0))).tolist() == [1002.0, 998.0]
    assert elo(battles((0, 1, 0.0))).tolist() == [998.0, 1002.0]
    assert elo(battles((0, 1, 0.5))).tolist() == [1000.0, 1000.0]


def test_elo_is_the_textbooks_formula_in_the_files_order():
    rows = [(0, 1, 1.0), (1, 2, 0.5), (2, 0, 0.0), (0, 1, 0.0), (1, 2, 1.0)]
    expected = [1000.0] * 3
    for left, right, won in rows:
        chance = 1 / (1 + 10 ** ((expected[right] - expected[left]) / 400))
        expected[left] += 4 * (won - chance)
        expected[right] += 4 * ((1 - won) - (1 - chance))
    assert elo(battles(*rows)).tolist() == pytest.approx(expected, abs=1e-9)
    assert elo(battles(*rows[::-1])).tolist() != pytest.approx(expected, abs=1e-6)
    assert sum(expected) == pytest.approx(3000)


def test_wins_are_counted_both_ways_and_ties_are_half():
    wins = count_wins(battles((0, 1, 1.0), (1, 0, 1.0), (1, 0, 0.0), (1, 2, 0.5)))
    assert wins.tolist() == [[0, 2, 0], [1, 0, 0.5], [0, 0.5, 0]]


def test_two_models_differ_by_the_log_of_their_wins():
    # 3 to 1, and a tie: 3.5 to 1.5.
    wins = count_wins(battles(*[(0, 1, 1.0)] * 3, (0, 1, 0.0), (0, 1, 0.5)))
    found = bradley_terry(wins)
    assert found[0] - found[1] == pytest.approx(math.log(3.5 / 1.5), abs=1e-9)
    ratings = as_rating(found)
    assert ratings.mean() == pytest.approx(1000)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3.5 / 1.5), abs=1e-6)
    assert as_share(found).tolist() == pytest.approx([0.7, 0.3], abs=1e-9)


def by_solver(wins):
    """The likelihood typed out, maximised by scipy; mean 0."""
    n = len(wins)

    def loss(x):
        return sum(
            wins[i, j] * math.log1p(math.exp(x[j] - x[i])) for i in range(n) for j in range(n)
        )

    found = minimize(loss, np.zeros(n), method="BFGS", options={"gtol": 1e-9}).x
    return found - found.mean()


@given(st.data())
def test_bradley_terry_is_the_likelihoods_maximum(data):
    n = data.draw(st.integers(2, 5))
    counts = st.lists(st.integers(1, 9), min_size=n * n, max_size=n * n)
    wins = np.array(data.draw(counts), dtype=float).reshape(n, n) / 2
    np.fill_diagonal(wins, 0)
    assert bradley_terry(wins) == pytest.approx(by_solver(wins), abs=1e-5)


def test_bradley_terry_is_what_another_library_finds():
    choix = pytest.importorskip("choix")
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(400)]
    found = bradley_terry(count_wins(battles(*[(a, b, 1.0) for a, b in pairs])))
    assert found == pytest.approx(choix.opt_pairwise(6, pairs, alpha=0.0), abs=1e-4)


def test_strong_differences_converge():
    rows = [(0, 1, 1.0)] * 100_000 + [(0, 1, 0.0)] + [(1, 2, 1.0)] * 100_000 + [(1, 2, 0.0)]
    found = bradley_terry(count_wins(battles(*rows)))
    assert found[0] - found[1] == pytest.approx(math.log(100_000), abs=1e-6)


def test_votes_on_which_plain_newton_steps_diverge_are_rated():
    """Found by a search: a ring of lopsided results, on which the full step jumps ever further."""
    wins = np.array(
        [
            [0, 0, 1, 0, 0],
            [6, 0, 0, 0, 3],
            [2, 0, 0, 3295, 2],
            [3, 10192, 0, 0, 1],
            [5641, 0, 136216, 3, 0],
        ],
        dtype=float,
    )
    found = bradley_terry(wins)
    chance = 1 / (1 + np.exp(found - found[:, None]))
    # At the maximum every model has won as often as its strength makes expect.
    expected = ((wins + wins.T) * chance).sum(axis=1)
    assert expected == pytest.approx(wins.sum(axis=1), rel=1e-6)


def test_who_only_wins_or_only_loses_or_never_meets_the_others_has_no_rating():
    wins = count_wins(
        battles((0, 1, 1.0), (1, 0, 1.0), (2, 0, 1.0), (0, 3, 1.0), (4, 5, 0.5), num_models=7)
    )
    found = bradley_terry(wins)
    assert np.isnan(found).tolist() == [False, False, True, True, True, True, True]
    assert found[:2].tolist() == pytest.approx([0.0, 0.0])
    reasons = why_unrated(wins, found)
    assert reasons[2] == "only wins"
    assert reasons[3] == "only losses"
    assert reasons[6] == "no battles"
    assert "link" in reasons[4]
    assert 0 not in reasons
    shares = as_share(found)
    assert np.nansum(shares) == pytest.approx(1)


def test_two_groups_whose_battles_went_one_way_are_not_rated_together():
    both = [(a, b, 0.5) for a, b in ((0, 1), (2, 3), (2, 4), (3, 4))]
    wins = count_wins(battles(*both, (0, 2, 1.0)))
    found = bradley_terry(wins)
    assert np.isnan(found).tolist() == [True, True, False, False, False]
    assert "one way" in why_unrated(wins, found)[0]


def test_no_battles_at_all_are_no_ratings():
    wins = np.zeros((3, 3))
    assert np.isnan(bradley_terry(wins)).all()
    assert np.isnan(average_win_rate(wins)).all()


def test_the_win_rate_is_averaged_over_opponents_not_battles():
    # 9 of 10 against the first, 0 of 1 against the second.
    rows = [(0, 1, 1.0)] * 9 + [(0, 1, 0.0), (0, 2, 0.0)]
    assert average_win_rate(count_wins(battles(*rows)))[0] == pytest.approx(0.45)


def test_a_resample_keeps_the_number_of_battles_and_follows_the_seed():
    rows = [(0, 1, 1.0)] * 30 + [(0, 1, 0.5)] * 10 + [(2, 1, 0.0)] * 20
    first = list(resample_wins(battles(*rows), 50, 3))
    again = list(resample_wins(battles(*rows), 50, 3))
    other = list(resample_wins(battles(*rows), 50, 4))
    assert all(each.sum() == pytest.approx(60) for each in first)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    means = np.mean(first, axis=0)
    assert means[0, 1] == pytest.approx(35, abs=3)
    assert means[1, 0] == pytest.approx(5, abs=2)
    assert means[1, 2] == pytest.approx(20, abs=3)


def test_a_resample_is_rated_at_the_level_of_the_whole():
    wins = count_wins(battles(*[(a, b, 0.5) for a, b in ((0, 1), (1, 2), (0, 2))]))
    point = np.array([1.0, 0.0, -1.0])
    # The third has dropped out; the others' mean stays that of the whole.
    lost = wins.copy()
    lost[2], lost[:, 2] = 0, 0
    found = bradley_terry_beside(lost, point)
    assert np.isnan(found[2])
    assert found[:2].mean() == pytest.approx(0.5)


def test_intervals_leave_out_rounds_without_an_estimate_unless_most_are():
    rounds = np.array([[1.0, np.nan, np.nan], [2.0, 4.0, np.nan], [3.0, 6.0, 5.0]])
    low, high = percentiles(rounds)
    assert low[:2].tolist() == pytest.approx([1.05, 4.05])
    assert high[:2].tolist() == pytest.approx([2.95, 5.95])
    assert math.isnan(low[2])
    assert math.isnan(high[2])


def test_a_rank_counts_the_models_that_are_surely_better():
    # The second overlaps with the first; the third lies below both.
    assert ranks_by_overlap([10, 8, 1], [14, 11, 5]) == [1, 1, 3]
    # Touching is no overlap to be sure of: the ends have to part.
    assert ranks_by_overlap([5, 1], [9, 5]) == [1, 1]


def test_numbers_make_no_difference_but_which_is_which():
    rows = [(0, 1, 1.0), (1, 0, 1.0), (1, 2, 1.0), (2, 0, 1.0), (0, 2, 0.5)]
    renamed = {0: 2, 1: 0, 2: 1}
    other = [(renamed[a], renamed[b], won) for a, b, won in rows]
    first, second = (bradley_terry(count_wins(battles(*each))) for each in (rows, other))
    assert [second[renamed[n]] for n in range(3)] == pytest.approx(first.tolist(), abs=1e-9)
    swapped = [(b, a, 1 - won) for a, b, won in rows]
    assert bradley_terry(count_wins(battles(*swapped))) == pytest.approx(first, abs=1e-9)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["food", "simple"])
def test_golden_ratings_of_another_program(test_data, tmp_path, name):
    folder = test_data / "arena"
    votes = read_votes(folder / f"{name}.csv", quarantine=tmp_path / "quarantine.jsonl")
    golden = {}
    with (folder / f"{name}-golden.csv").open() as file:
        for row in csv.DictReader(file):
            golden.setdefault(row["algorithm"], {})[row["item"]] = float(row["score"])
    wins = count_wins(votes.battles)
    found = {
        "elo": elo(votes.battles),
        "bradley_terry": as_share(bradley_terry(wins)),
        "average_win_rate": average_win_rate(wins),
    }
    for algorithm, values in found.items():
        by_name = dict(zip(votes.models, values.tolist(), strict=True))
        assert by_name.keys() == golden[algorithm].keys()
        for model, value in by_name.items():
            assert value == pytest.approx(golden[algorithm][model], abs=1e-6), (algorithm, model)
