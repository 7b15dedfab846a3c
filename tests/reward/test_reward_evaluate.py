"""What is said of scores beside rankings: cases counted by hand, and scipy's rank correlations."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from starling.data.reward_pairs import RewardPair
from starling.reward.dataset import RankedRow
from starling.reward.evaluate import (
    evaluate,
    evaluate_pairs,
    length_only_accuracy,
    ordered_pairs,
    pair_accuracy,
)


def row(ranks, *, id="a", chars=None, source=None, key=None, answers=None):
    """A row of which only ranks, lengths, source, prompt and the answers' identity matter here."""
    chars = [1] * len(ranks) if chars is None else chars
    answers = range(len(ranks)) if answers is None else answers
    sequences = tuple((answer,) for answer in answers)
    return RankedRow(
        id, sequences, tuple(ranks), tuple(chars), source=source, weight=1.0, key=key or id
    )


def evaluated(ranks, scores, **fields):
    return evaluate([row(ranks, **fields)], [scores], seed=0)


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


def test_all_figures_are_json_and_the_two_headlines_are_those_of_the_functions():
    rows = [row([1, 2, 3], id="a", chars=[3, 9, 4]), row([2, 1, None], id="b", chars=[5, 6, 7])]
    scores = [[3.0, 1.0, 2.0], [0.0, 1.0, 0.5]]
    found = json.loads(json.dumps(evaluate(rows, scores, seed=3), allow_nan=False))
    assert found["pair_accuracy"]["mean"] == pair_accuracy(rows, scores, seed=3).mean == 4 / 6
    assert found["length_only_accuracy"]["mean"] == length_only_accuracy(rows, seed=3).mean
    assert (found["rankings"], found["prompts"]) == (2, 2)


def test_accuracy_by_distance_counts_levels_and_unranked_is_one_below_the_last():
    # Levels 1, 2, 2, 3. One apart: right, wrong (1-2); wrong, right (2-3). Two apart: right.
    found = evaluated([1, 2, 2, None], [1.0, 0.0, 2.0, 0.5])
    assert found["adjacent_accuracy"]["mean"] == found["by_distance"]["1"]["mean"] == 0.5
    assert found["adjacent_accuracy"]["n"] == 4
    assert (found["by_distance"]["2"]["mean"], found["by_distance"]["2"]["n"]) == (1.0, 1)
    assert list(found["by_distance"]) == ["1", "2"]


def test_a_source_with_few_rankings_is_counted_and_not_told_apart():
    def some(source, count, scores):
        return [(row([1, 2], id=f"{source}{n}", source=source), scores) for n in range(count)]

    rows, scores = zip(
        *some("many", 10, [1.0, 0.0]), *some("few", 9, [0.0, 1.0]), *some(None, 11, [0.0, 1.0]),
        strict=True,
    )  # fmt: skip
    found = evaluate(rows, scores, seed=0)
    assert {name: part["mean"] for name, part in found["by_source"].items()} == {"many": 1.0}
    assert found["rankings_of_other_sources"] == 20


def test_pairs_are_split_by_which_answer_is_longer():
    # Right where the better is longer (30 > 20), wrong where it is shorter, equal is in neither.
    rows = [row([1, 2], id="a", chars=[30, 20]), row([1, 2], id="b", chars=[10, 25])]
    rows += [row([1, 2], id="c", chars=[7, 7])]
    found = evaluate(rows, [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], seed=0)
    assert (found["better_is_longer"]["mean"], found["better_is_longer"]["n"]) == (1.0, 1)
    assert (found["better_is_shorter"]["mean"], found["better_is_shorter"]["n"]) == (0.0, 1)
    assert (found["longer_preferred"]["model"]["mean"]) == 1.0
    assert (found["longer_preferred"]["judge"]["mean"]) == 0.5
    differences = found["by_length_difference"]
    assert [part["characters"] for part in differences] == [-15.0, 0.0, 10.0]
    assert [part["accuracy"]["mean"] for part in differences] == [0.0, 1.0, 1.0]


def test_a_figure_that_nothing_says_is_none():
    found = evaluated([1, 2], [1.0, 0.0])
    for name in ("better_is_longer", "better_is_shorter", "noise_ceiling"):
        assert found[name] is None
    assert found["longer_preferred"] == {"model": None, "judge": None}
    assert found["score_length_correlation"]["model"] == {"pearson": None, "spearman": None}


@settings(max_examples=30)
@given(seed=st.integers(0, 1000))
def test_correlations_with_length_are_scipys_on_each_prompts_deviations(seed):
    draw = np.random.default_rng(seed)
    scores = draw.normal(size=(4, 5)) + 10 * draw.normal(size=(4, 1))
    chars = draw.integers(1, 30, size=(4, 5))
    ranks = draw.permuted(np.tile([1, 2, 3, 4, 5], (4, 1)), axis=1)
    rows = [row(r.tolist(), id=str(n), chars=chars[n].tolist()) for n, r in enumerate(ranks)]
    found = evaluate(rows, scores.tolist(), seed=0)["score_length_correlation"]

    def centred(values):
        return (values - values.mean(axis=1, keepdims=True)).ravel()

    def ranked(values):
        return centred(stats.rankdata(values, axis=1))

    for name, values in (("model", scores), ("judge", -ranks)):
        pearson = stats.pearsonr(centred(values), centred(chars)).statistic
        assert found[name]["pearson"] == pytest.approx(pearson, abs=1e-9)
        spearman = stats.pearsonr(ranked(values), ranked(chars)).statistic
        assert found[name]["spearman"] == pytest.approx(spearman, abs=1e-9)


def test_calibration_of_a_model_that_says_three_quarters_and_is_right_in_half():
    difference = math.log(3)  # sigmoid: 0.75
    rows = [row([1, 2], id="a"), row([2, 1], id="b")]
    found = evaluate(rows, [[difference, 0.0]] * 2, seed=0)["calibration"]
    assert found["bins"] == [{"predicted": pytest.approx(0.75), "observed": 0.5, "pairs": 2}]
    assert found["expected_error"] == pytest.approx(0.25)
    assert found["log_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    # Normalised by a deviation of 2, and given it, the same.
    scaled = evaluate(rows, [[difference / 2, 0.0]] * 2, seed=0, scale=2.0)["calibration"]
    assert scaled["expected_error"] == pytest.approx(0.25)


def test_the_calibration_error_weighs_bins_by_their_pairs():
    # Three pairs at 0.9 all right (0.1 off), one at 0.6 wrong (0.6 off).
    rows = [row([1, 2], id=str(n)) for n in range(4)]
    scores = [[math.log(9), 0.0]] * 3 + [[0.0, math.log(1.5)]]
    found = evaluate(rows, scores, seed=0)["calibration"]
    assert found["expected_error"] == pytest.approx((3 * 0.1 + 0.6) / 4)
    assert [part["pairs"] for part in found["bins"]] == [1, 3]


def test_a_certain_model_stands_in_the_last_bin_and_overflows_nothing():
    found = evaluated([1, 2], [5000.0, -5000.0])["calibration"]
    assert found["bins"] == [{"predicted": 1.0, "observed": 1.0, "pairs": 1}]
    assert found["log_loss"] == 0.0


def test_ndcg_of_three_answers_by_hand():
    # Gains 2, 1, 0; the model's order is second, first, third.
    best = 2 / math.log2(2) + 1 / math.log2(3)
    expected = (1 / math.log2(2) + 2 / math.log2(3)) / best
    assert evaluated([1, 2, 3], [1.0, 2.0, 0.0])["ndcg"]["mean"] == pytest.approx(expected)
    # Equal scores: the mean over the orders.
    half = 1.5 * (1 / math.log2(2) + 1 / math.log2(3)) / best
    assert evaluated([1, 2, 3], [1.0, 1.0, 0.0])["ndcg"]["mean"] == pytest.approx(half)


@st.composite
def rankings_with_scores(draw):
    """Dense ranks with ties, perhaps unranked ones, not all alike; scores that may tie."""
    k = draw(st.integers(2, 6))
    raw = draw(st.lists(st.integers(1, 4), min_size=k, max_size=k).filter(lambda r: len({*r}) > 1))
    ranks = [sorted(set(raw)).index(rank) + 1 for rank in raw]
    if draw(st.booleans()):
        ranks = [None if rank == max(ranks) else rank for rank in ranks]
    scores = draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=k, max_size=k))
    return ranks, scores


@settings(max_examples=30)
@given(rankings_with_scores())
def test_kendalls_tau_is_scipys_and_counted_as_failed_where_undefined(case):
    ranks, scores = case
    found = evaluated(ranks, scores)["kendall_tau"]
    expected = stats.kendalltau([-9 if r is None else -r for r in ranks], scores).statistic
    if math.isnan(expected):
        assert found is None
    else:
        assert found["mean"] == pytest.approx(expected, abs=1e-12)
    both = evaluate([row(ranks), row([1, 2], id="b")], [scores, [1.0, 0.0]], seed=0)["kendall_tau"]
    assert both["num_failed"] == math.isnan(expected)


@settings(max_examples=30)
@given(rankings_with_scores())
def test_best_of_n_is_the_mean_over_all_draws_of_n_answers(case):
    ranks, scores = case
    # The judge's mean places as scipy has them, as 1 for the best to 0 for the last.
    places = stats.rankdata([9 if rank is None else rank for rank in ranks])
    standing = 1 - (places - 1) / (len(ranks) - 1)

    def by_enumeration(n, values):
        picks = []
        for drawn in combinations(range(len(values)), n):
            best = max(values[i] for i in drawn)
            picks.append(np.mean([standing[i] for i in drawn if values[i] == best]))
        return np.mean(picks)

    for point in evaluated(ranks, scores)["best_of_n"]:
        assert point["model"]["mean"] == pytest.approx(by_enumeration(point["n"], scores))
        assert point["oracle"] == pytest.approx(by_enumeration(point["n"], standing))
    assert point["n"] == len(ranks)
    assert standing.mean() == pytest.approx(point["chance"])


def test_best_of_n_is_over_the_rankings_that_have_so_many():
    rows = [row([1, 2, 3], id="a"), row([1, 2], id="b")]
    curve = evaluate(rows, [[0.0, 1.0, 2.0], [1.0, 0.0]], seed=0)["best_of_n"]
    assert [point["model"]["n"] for point in curve] == [2, 2, 1]
    assert curve[2]["model"]["mean"] == 0.0
    # Of two: the wrong ones are picked of three (0.5, 0, 0), the right one of two.
    assert curve[1]["model"]["mean"] == pytest.approx((0.5 / 3 + 1) / 2)
    assert curve[2]["oracle"] == 1.0


def test_repeated_rankings_say_how_far_a_model_can_get():
    # The same three answers in another order of presentation; they agree on two of three pairs.
    rows = [
        row([1, 2, 3], id="a", key="p", answers=[5, 6, 7]),
        row([3, 1, 2], id="b", key="p", answers=[7, 6, 5]),
        row([1, 2], id="c", key="other", answers=[5, 6]),
    ]
    found = evaluate(rows, [[0.0] * 3, [0.0] * 3, [0.0] * 2], seed=0)["noise_ceiling"]
    assert found["agreement"]["mean"] == pytest.approx(2 / 3)
    # Right at p each, two agree at p^2 + (1 - p)^2 = 2/3.
    p = found["at_most"]
    assert p**2 + (1 - p) ** 2 == pytest.approx(2 / 3)


def test_two_rankings_are_compared_on_answers_that_both_have_and_one_ranks():
    # Shared: 5, 6, 7. In the second, 6 and 7 are unranked: it says nothing of them.
    rows = [
        row([1, 2, 3, 4], id="a", key="p", answers=[5, 6, 7, 8]),
        row([1, None, None, 2], id="b", key="p", answers=[5, 6, 7, 9]),
    ]
    agreement = evaluate(rows, [[0.0] * 4] * 2, seed=0)["noise_ceiling"]["agreement"]
    # 5 beats 6 and 7, from either side.
    assert (agreement["mean"], agreement["n"]) == (1.0, 4)


def test_rankings_of_one_prompt_are_one_cluster():
    rows = [row([1, 2], id="a", key="p"), row([1, 2], id="b", key="p")]
    estimate = pair_accuracy(rows, [[1.0, 0.0], [0.0, 1.0]], seed=0)
    assert (estimate.low, estimate.high) == (None, None)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite"):
        evaluated([1, 2], [math.nan, 0.0])


def pair(chosen, rejected, subset=None, prompt="q"):
    return RewardPair.model_validate(
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset}
    )


def test_a_pair_file_is_told_by_subset_beside_length():
    pairs = [
        pair("longer", "no", "easy", "a"),
        pair("yes", "longer", "hard", "b"),
        pair("four", "five", "hard", "c"),
        pair("yes", "longer", "hard", "d"),
        pair("y", "no", prompt="e"),
    ]
    scores = [(1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (0.0, 1.0)]
    found = evaluate_pairs(pairs, scores, seed=0)
    assert list(found["subsets"]) == ["easy", "hard", "none"]
    hard = found["subsets"]["hard"]
    # Right, wrong and half of three; the lengths: shorter, equal, shorter.
    assert (hard["accuracy"]["mean"], hard["accuracy"]["n"]) == (0.5, 3)
    assert (hard["longer"], hard["shorter"]) == (pytest.approx(1 / 6), pytest.approx(5 / 6))
    assert found["all"]["accuracy"]["mean"] == 0.5
    assert found["mean_of_subsets"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["subsets"]["easy"]["longer"] == 1.0


def test_pairs_of_one_prompt_are_one_cluster():
    pairs = [pair("yes", "no"), pair("aye", "nay")]
    found = evaluate_pairs(pairs, [(1.0, 0.0), (0.0, 1.0)], seed=0)
    assert found["all"]["accuracy"]["low"] is None
