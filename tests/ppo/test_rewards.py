"""Scores before PPO sees them: hand values, and moments against Python's own statistics."""

import json
import math
import statistics
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.ppo.rewards import (
    RunningMoments,
    add_missing_end,
    centre_clip_scale,
    combine_mean,
    combine_minimum,
    combine_pessimistic,
    length_correlation,
    penalise_length,
    replace_missing_end,
)

SCORE = st.floats(-100, 100)


@given(batches=st.lists(st.lists(SCORE, max_size=6), min_size=1, max_size=6).filter(any))
def test_the_moments_are_those_of_all_scores_however_they_came(batches):
    moments = RunningMoments()
    for batch in batches:
        moments = moments.updated(torch.tensor(batch, dtype=torch.float64))
    everything = [score for batch in batches for score in batch]
    assert moments.count == len(everything)
    assert moments.mean == pytest.approx(statistics.fmean(everything), abs=1e-12)
    assert moments.std == pytest.approx(statistics.pstdev(everything), rel=1e-12, abs=1e-12)


def test_a_large_offset_does_not_drown_the_spread():
    # In float32, or as mean of squares minus square of mean, nothing would be left of it.
    moments = RunningMoments()
    for batch in ([1e8 + 1, 1e8 + 2], [1e8 + 3], [1e8 + 4]):
        moments = moments.updated(torch.tensor(batch, dtype=torch.float64))
    assert moments.std == pytest.approx(math.sqrt(1.25), rel=1e-12)


@pytest.mark.parametrize("score", [0.1, -8.32, 1 / 3])
def test_equal_scores_have_exactly_no_spread(score):
    moments = RunningMoments()
    for size in (3, 7, 49):
        moments = moments.updated(torch.full((size,), score))
    assert moments.std == 0.0


def test_moments_are_plain_json_and_come_back_the_same():
    moments = RunningMoments().updated(torch.tensor([0.1, 0.7, -3.0]))
    kept = json.loads(json.dumps(asdict(moments)))
    assert kept.keys() == {"count", "mean", "m2"}
    assert RunningMoments(**kept) == moments


def test_no_scores_change_nothing_and_have_no_deviation():
    with pytest.raises(ValueError, match="no scores yet"):
        _ = RunningMoments().std
    moments = RunningMoments().updated(torch.tensor([1.0, 2.0]))
    assert moments.updated(torch.tensor([])) == moments


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_does_not_enter_the_moments(score):
    with pytest.raises(ValueError, match="not finite"):
        RunningMoments().updated(torch.tensor([1.0, score]))


def test_scores_are_centred_then_clipped_then_scaled_then_shifted():
    # Raw scores around -8, as Starling-RM-34B's: less -8, within 3, over 2, plus 0.5.
    scores = torch.tensor([-8.0, -6.0, -14.0, 0.0])
    found = centre_clip_scale(scores, centre=-8.0, clip=3.0, scale=2.0, shift=0.5)
    assert_close(found, torch.tensor([0.5, 1.5, -1.0, 2.0]))


def test_without_a_clip_nothing_is_cut():
    found = centre_clip_scale(
        torch.tensor([-500.0, 500.0]), centre=0.0, clip=None, scale=1.0, shift=0.0
    )
    assert found.tolist() == [-500.0, 500.0]


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_a_scale_that_would_flip_or_blow_up_the_scores_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        centre_clip_scale(torch.ones(2), centre=0.0, clip=None, scale=scale, shift=0.0)


def test_each_token_costs_the_length_penalty():
    found = penalise_length(torch.tensor([1.0, 1.0]), torch.tensor([0, 10]), length_penalty=0.02)
    assert_close(found, torch.tensor([1.0, 0.8]))


def test_a_missing_end_replaces_the_score_or_is_added_to_it():
    # training.md, item 14: a score of 3 without the end marker.
    scores, is_finished = torch.tensor([3.0, 3.0]), torch.tensor([True, False])
    assert replace_missing_end(scores, is_finished, penalty=-1.0).tolist() == [3.0, -1.0]
    assert add_missing_end(scores, is_finished, penalty=-1.0).tolist() == [3.0, 2.0]


def test_a_replaced_score_may_have_been_no_number():
    scores = torch.tensor([math.nan, 1.0])
    found = replace_missing_end(scores, torch.tensor([False, True]), penalty=-4.0)
    assert found.tolist() == [-4.0, 1.0]


MODELS = torch.tensor([[1.0, 4.0], [3.0, 4.0], [8.0, -2.0]])


def test_several_models_agree_by_weighted_mean_by_minimum_or_with_caution():
    # (1 * 1 + 2 * 3 + 1 * 8) / 4 and (4 + 8 - 2) / 4.
    assert_close(combine_mean(MODELS, torch.tensor([1.0, 2.0, 1.0])), torch.tensor([3.75, 2.5]))
    assert_close(combine_minimum(MODELS), torch.tensor([1.0, -2.0]))
    expected = [
        statistics.fmean(column) - 0.5 * statistics.pstdev(column)
        for column in ([1.0, 3.0, 8.0], [4.0, 4.0, -2.0])
    ]
    assert_close(combine_pessimistic(MODELS, deviations=0.5), torch.tensor(expected))


def test_weights_count_relative_to_each_other():
    once = combine_mean(MODELS, torch.tensor([1.0, 2.0, 1.0]))
    assert_close(combine_mean(MODELS, torch.tensor([10.0, 20.0, 10.0])), once)


def test_one_model_is_itself_whatever_the_rule():
    alone = MODELS[:1]
    assert combine_mean(alone, torch.tensor([3.0])).tolist() == [1.0, 4.0]
    assert combine_minimum(alone).tolist() == [1.0, 4.0]
    assert combine_pessimistic(alone, deviations=2.0).tolist() == [1.0, 4.0]


@pytest.mark.parametrize("weights", [[1.0, -0.5, 1.0], [0.0, 0.0, 0.0]])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be"):
        combine_mean(MODELS, torch.tensor(weights))


@given(rows=st.lists(st.tuples(st.floats(-9, 9, width=32), st.integers(1, 999)), max_size=9))
def test_the_correlation_with_length_is_pearsons(rows):
    scores = [score for score, _ in rows]
    lengths = [float(length) for _, length in rows]
    found = length_correlation(torch.tensor(scores), torch.tensor(lengths).long())
    if len(set(scores)) < 2 or len(set(lengths)) < 2:
        assert found is None
    elif statistics.pstdev(scores) > 1e-6:
        assert found == pytest.approx(statistics.correlation(scores, lengths), abs=1e-9)


def test_longer_and_better_is_plus_one_and_longer_and_worse_is_minus_one():
    lengths = torch.tensor([10, 20, 30])
    assert length_correlation(torch.tensor([1.0, 2.0, 3.0]), lengths) == pytest.approx(1.0)
    assert length_correlation(torch.tensor([3.0, 2.0, 1.0]), lengths) == pytest.approx(-1.0)
