"""Pair accuracy and its length-only baseline, on cases that can be counted by hand."""

import pytest

from starling.reward.dataset import RankedRow
from starling.reward.evaluate import length_only_accuracy, ordered_pairs, pair_accuracy


def row(ranks, *, id="a", chars=None):
    """A row of which only ranks and lengths matter here."""
    chars = [1] * len(ranks) if chars is None else chars
    return RankedRow(id, ((1,),) * len(ranks), tuple(ranks), tuple(chars))


def accuracy(ranks, scores):
    return pair_accuracy([row(ranks)], [scores], seed=0)


def test_ties_make_no_pair_and_unranked_answers_lose_to_every_ranked_one():
    assert set(ordered_pairs([2, 1, None, 2, None])) == {
        (1, 0), (1, 3), (0, 2), (0, 4), (1, 2), (1, 4), (3, 2), (3, 4),
    }  # fmt: skip


def test_scores_in_the_order_of_the_ranking_are_all_right_and_reversed_all_wrong():
    assert accuracy([2, 1, 3], [0.5, 2.0, -1.0]).mean == 1
    assert accuracy([2, 1, 3], [0.5, -1.0, 2.0]).mean == 0


def test_one_wrong_pair_of_three_is_counted():
    # Right: (1st, 3rd), (2nd, 3rd); wrong: (1st, 2nd).
    estimate = accuracy([1, 2, 3], [1.0, 2.0, 0.0])
    assert estimate.mean == pytest.approx(2 / 3)
    assert estimate.n == 3


def test_equal_scores_count_half():
    assert accuracy([1, 2], [0.25, 0.25]).mean == 0.5
    # Pairs: right, right, half.
    assert accuracy([1, 2, 3], [2.0, 1.0, 1.0]).mean == pytest.approx(2.5 / 3)


def test_answers_of_the_same_rank_are_not_compared():
    # Two pairs only, one right and one wrong; the tied two differ wildly.
    assert accuracy([1, 1, 2], [9.0, -9.0, 0.0]).mean == 0.5


def test_an_unranked_answer_above_a_ranked_one_is_a_mistake():
    estimate = accuracy([1, None, None], [0.0, 1.0, -1.0])
    assert (estimate.mean, estimate.n) == (0.5, 2)


def test_every_pair_weighs_the_same_and_prompts_are_the_clusters():
    # Three pairs of one prompt right, one pair of the other wrong.
    rows = [row([1, 2, 3], id="a"), row([1, 2], id="b")]
    estimate = pair_accuracy(rows, [[3.0, 2.0, 1.0], [0.0, 1.0]], seed=0)
    assert (estimate.mean, estimate.n) == (0.75, 4)
    # Two clusters drawn with replacement: all right, mixed or all wrong.
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_length_alone_scores_the_better_of_longer_wins_and_shorter_wins():
    longer_wins = [row([1, 2, 3], chars=[30, 20, 10]), row([2, 1], chars=[5, 9])]
    assert length_only_accuracy(longer_wins, seed=0).mean == 1
    shorter_wins = [row([1, 2, 3], chars=[10, 20, 30]), row([2, 1], chars=[9, 5])]
    assert length_only_accuracy(shorter_wins, seed=0).mean == 1
    # Longer wins one pair, shorter wins three.
    mixed = [row([1, 2, 3], chars=[10, 20, 30]), row([2, 1], chars=[5, 9])]
    assert length_only_accuracy(mixed, seed=0).mean == 0.75


def test_equal_lengths_say_nothing():
    assert length_only_accuracy([row([1, 2, 3], chars=[7, 7, 7])], seed=0).mean == 0.5
