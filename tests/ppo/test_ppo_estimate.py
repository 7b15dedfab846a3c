"""From scores to advantages by hand: the order of the steps, and groups on a rollout's record."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from rollouts import PROMPTS, ScriptedEngine, make, samplings, scorer, section_of
from starling.ppo.advantage import shape_rewards
from starling.ppo.estimate import estimator, shaped_scores, whitened
from starling.ppo.rewards import RunningMoments


def answered(scores, *, finished=None, lengths=None, samples=1, values=None):
    """A rollout with these scores, of responses of these lengths."""
    count = len(scores)
    finished = [True] * count if finished is None else finished
    lengths = [2] * count if lengths is None else lengths
    made = make(samples_per_prompt=samples)
    reasons = ["stop" if is_finished else "length" for is_finished in finished]
    engine = ScriptedEngine([((40,) * n, r) for n, r in zip(lengths, reasons, strict=True)])
    collector = dataclasses.replace(made.collector, engine=engine, scorer=scorer(len))
    prompts = [PROMPTS[row // samples] for row in range(count)]
    rollout = collector.collect(prompts, samplings(count))
    replaced = {"scores": torch.tensor(scores, dtype=torch.float32)}
    if values is not None:
        replaced["old_values"] = torch.tensor(values)
    return dataclasses.replace(rollout, **replaced)


def shaped(rollout, moments=None, **settings):
    found, after = shaped_scores(rollout, moments or RunningMoments(), section_of(**settings))
    return found.tolist(), after


def test_scores_are_centred_then_clipped_then_scaled_then_shifted():
    rollout = answered([-8.0, -6.0, -7.0, -7.0])
    # Mean -7, deviation sqrt(1/2).  Clipped first, all would be -5; scaled first, none would be
    # clipped at 0.5 of the deviation's unit as here: +-1 clipped to 0.5, over 0.7071, plus 0.25.
    found, after = shaped(
        rollout,
        reward_centre="running",
        reward_clip=0.5,
        reward_scale="running",
        reward_shift=0.25,
    )
    side = 0.5 / 0.5**0.5
    assert found == pytest.approx([0.25 - side, 0.25 + side, 0.25, 0.25])
    assert (after.count, after.mean) == (4, -7.0)


def test_the_moments_take_the_batch_in_before_they_are_used():
    # 2, 4 before and 6, 8 now: mean 5, variance 5.
    moments = RunningMoments().updated(torch.tensor([2.0, 4.0]))
    found, after = shaped(
        answered([6.0, 8.0]), moments, reward_centre="running", reward_scale="running"
    )
    assert found == pytest.approx([1 / 5**0.5, 3 / 5**0.5])
    assert (after.count, after.mean, after.std) == (4, 5.0, pytest.approx(5**0.5))
    # Scaled alone, they keep their mean.
    found, _ = shaped(answered([6.0, 8.0]), moments, reward_scale="running")
    assert found == pytest.approx([6 / 5**0.5, 8 / 5**0.5])


def test_without_running_moments_scores_are_taken_as_they_are():
    moments = RunningMoments(count=9, mean=4.0, m2=3.0)
    found, after = shaped(answered([6.0, -8.0, 0.5]), moments)
    assert found == [6.0, -8.0, 0.5]
    assert after == moments
    found, _ = shaped(answered([6.0, -8.0, 0.5]), moments, reward_clip=2.0, reward_shift=1.0)
    assert found == [3.0, -1.0, 1.5]


def test_equal_scores_are_scaled_without_a_division_by_zero():
    found, _ = shaped(answered([3.0, 3.0]), reward_centre="running", reward_scale="running")
    assert found == [0.0, 0.0]


def test_a_missing_end_replaces_the_shaped_score_or_is_added_to_it():
    rollout = answered([3.0, 3.0, -9.0, -9.0], finished=[True, False, True, False])
    settings = {"missing_end_penalty": -1.0, "reward_clip": 5.0, "reward_shift": 0.5}
    assert shaped(rollout, **settings)[0] == [3.5, -1.0, -4.5, -1.0]
    assert shaped(rollout, missing_end="add", **settings)[0] == [3.5, 2.5, -4.5, -5.5]
    assert shaped(rollout, missing_end_penalty=None)[0] == [3.0, 3.0, -9.0, -9.0]
    # The penalty is not clipped with the scores.
    found, _ = shaped(rollout, missing_end_penalty=-5.0, reward_clip=2.0)
    assert found == [2.0, -5.0, -2.0, -5.0]


def test_every_token_costs_and_a_missing_end_has_the_last_word():
    rollout = answered([1.0, 1.0, 1.0], finished=[True, True, False], lengths=[1, 8, 8])
    settings = {"length_penalty": 0.25, "reward_clip": 0.5}
    assert shaped(rollout, **settings)[0] == [0.25, -1.5, -1.0]


def advantages_of(rollout, scores, **settings):
    """By the loop's own steps, with a penalty of 0.5 for each nat."""
    section = section_of(**settings)
    mask = rollout.response_mask
    kl = torch.where(mask, 0.2, 7.0)
    rewards = shape_rewards(torch.tensor(scores), kl, mask, kl_coef=0.5)
    return estimator(section)(rewards, rollout, section)


def test_rloo_on_a_rollout_by_hand():
    scores = [1.0, 2.0, 6.0, 4.0, 4.0, 5.0]
    lengths = [1, 2, 3, 2, 2, 2]
    rollout = answered(scores, lengths=lengths, samples=3)
    # Each token costs 0.1: rewards 0.9, 1.8, 5.7 and 3.8, 3.8, 4.8.
    found = advantages_of(rollout, scores, advantages="rloo", samples_per_prompt=3)
    expected = [0.9 - 3.75, 1.8 - 3.3, 5.7 - 1.35, 3.8 - 4.3, 3.8 - 4.3, 4.8 - 3.8]
    for row, (value, length) in enumerate(zip(expected, lengths, strict=True)):
        assert found.advantages[row, :length].tolist() == pytest.approx([value] * length, abs=1e-5)
        assert not found.advantages[row, length:].any()
    assert not found.returns.any()


def test_grpo_on_a_rollout_by_hand():
    scores = [1.0, 2.0, 6.0, 4.0, 4.0, 4.0]
    rollout = answered(scores, samples=3)
    found = advantages_of(rollout, scores, advantages="grpo", samples_per_prompt=3)
    # Gaps to the mean -2, -1, 3; deviation sqrt(14 / 2); the second prompt teaches nothing.
    expected = [gap / (7**0.5 + 1e-4) for gap in (-2, -1, 3)] + [0.0] * 3
    assert found.advantages[:, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert_close(found.advantages[:, 0], found.advantages[:, 1])


def test_gae_on_a_rollout_is_the_golden_one():
    rollout = answered([1.0], lengths=[3], values=[[0.2, 0.4, 0.6]])
    section = section_of(gamma=1.0, gae_lambda=0.95)
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    found = estimator(section)(rewards, rollout, section)
    assert found.advantages[0].tolist() == pytest.approx([0.751, 0.58, 0.4], abs=1e-6)
    assert found.returns[0].tolist() == pytest.approx([0.951, 0.98, 1.0], abs=1e-6)


def test_rewards_are_whitened_before_gae_and_keep_their_mean():
    rollout = answered([1.0, 1.0], lengths=[1, 2], values=[[0.0, 9.0], [0.0, 0.0]])
    section = section_of(gamma=1.0, gae_lambda=0.0, whiten_rewards=True)
    # 1, 2 and 6 (padding 99): mean 3, population variance 14 / 3; with V = 0 and lambda 0 they are
    # the advantages.
    rewards = torch.tensor([[1.0, 99.0], [2.0, 6.0]])
    found = estimator(section)(rewards, rollout, section).advantages
    deviation = (14 / 3) ** 0.5
    expected = [3 + (value - 3) / deviation for value in (1, 2, 6)]
    assert found[rollout.response_mask].tolist() == pytest.approx(expected, rel=1e-5)


def test_advantages_are_whitened_over_the_whole_batch_and_returns_are_not():
    rollout = answered([1.0, 1.0], lengths=[1, 2], values=[[0.5, 9.0], [0.5, 0.5]])
    section = section_of(gamma=1.0, gae_lambda=0.0)
    plain = estimator(section)(torch.tensor([[1.0, 0.0], [2.0, 6.0]]), rollout, section)
    found = whitened(plain, rollout, section)
    kept = found.advantages[rollout.response_mask]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert not found.advantages[~rollout.response_mask].any()
    assert torch.equal(found.returns, plain.returns)
    assert whitened(plain, rollout, section_of(whiten_advantages=False)) is plain


def test_without_a_centre_the_deviation_is_that_of_the_clipped_scores():
    # 1, -1, and 9 clipped to 2: their variance is 14/9.
    found, _ = shaped(answered([1.0, -1.0, 9.0]), reward_clip=2.0, reward_scale="running")
    deviation = (14 / 9) ** 0.5
    assert found == pytest.approx([1 / deviation, -1 / deviation, 2 / deviation])


@pytest.mark.parametrize("advantages", ["rloo", "grpo"])
def test_advantages_of_groups_are_never_whitened_over_tokens(advantages):
    rollout = answered([1.0, 2.0, 6.0], lengths=[1, 2, 3], samples=3)
    section = section_of(advantages=advantages, samples_per_prompt=3, whiten_advantages=True)
    plain = estimator(section)(torch.zeros(rollout.response_mask.shape), rollout, section)
    assert whitened(plain, rollout, section) is plain
