"""GAE against the paper's double sum and hand values; whitening and groups by definition."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.ppo.advantage import (
    estimate_advantages,
    grpo_advantages,
    rloo_advantages,
    scale_keeping_mean,
    shape_rewards,
    spread_over_tokens,
    whiten,
)

NUMBER = st.floats(-4, 4, width=32)
MASKED = None


def advantages_by_definition(rewards, values, gamma, gae_lambda):
    """Schulman et al. 2016, eq. 16, for one row of kept tokens, in Python floats."""
    n = len(rewards)
    v = [*values, 0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    return [
        math.fsum((gamma * gae_lambda) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)
    ]


@st.composite
def rows_with_gaps(draw):
    """Rows of (reward, value), or MASKED, before, between and after; at least one is kept."""
    cell = st.one_of(st.tuples(NUMBER, NUMBER), st.just(MASKED))
    width = draw(st.integers(1, 8))
    row = st.lists(cell, min_size=width, max_size=width).filter(any)
    return draw(st.lists(row, min_size=1, max_size=4))


def tensors(rows, filler):
    mask = torch.tensor([[cell is not MASKED for cell in row] for row in rows])
    pairs = torch.tensor(
        [[(filler, filler) if cell is MASKED else cell for cell in row] for row in rows]
    )
    return pairs[..., 0], pairs[..., 1], mask


def kept(tensor, mask):
    return [row[keep].tolist() for row, keep in zip(tensor, mask, strict=True)]


def golden(gae_lambda):
    return estimate_advantages(
        torch.tensor([[0.0, 0.0, 1.0]]),
        torch.tensor([[0.2, 0.4, 0.6]]),
        torch.ones(1, 3, dtype=torch.bool),
        gamma=1.0,
        gae_lambda=gae_lambda,
    )


def test_the_golden_row():
    # training.md, section 2, item 24.
    advantages, returns = golden(0.95)
    assert_close(advantages, torch.tensor([[0.751, 0.58, 0.4]]))
    assert_close(returns, torch.tensor([[0.951, 0.98, 1.0]]))


def test_lambda_one_returns_the_reward_to_go_and_lambda_zero_the_one_step_error():
    assert_close(golden(1.0).returns, torch.tensor([[1.0, 1.0, 1.0]]))
    # r + V' - V: 0.4 - 0.2, 0.6 - 0.4, 1 - 0.6.
    assert_close(golden(0.0).advantages, torch.tensor([[0.2, 0.2, 0.4]]))


@given(
    rows=rows_with_gaps(),
    gamma=st.sampled_from([1.0, 0.9, 0.5]),
    gae_lambda=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_it_is_the_double_sum_over_kept_tokens_whatever_is_masked_and_nan_does_not_leak(
    rows, gamma, gae_lambda
):
    rewards, values, mask = tensors(rows, filler=math.nan)
    advantages, returns = estimate_advantages(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    for row, got_advantages, got_returns in zip(
        rows, kept(advantages, mask), kept(returns, mask), strict=True
    ):
        own = [cell for cell in row if cell is not MASKED]
        expected = advantages_by_definition(*zip(*own, strict=True), gamma, gae_lambda)
        wanted = torch.tensor(expected)
        # The recursion rounds once a token; numbers reach 8 * 12.
        assert_close(torch.tensor(got_advantages), wanted, rtol=1e-5, atol=5e-5)
        own_values = torch.tensor([value for _, value in own])
        assert_close(torch.tensor(got_returns), wanted + own_values, rtol=1e-5, atol=5e-5)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_masked_tokens_in_the_middle_take_no_step_of_decay():
    rewards = torch.tensor([[0.0, 9.0, 9.0, 1.0]])
    mask = torch.tensor([[True, False, False, True]])
    advantages, _ = estimate_advantages(rewards, torch.zeros(1, 4), mask, gamma=0.5, gae_lambda=0.5)
    assert_close(advantages, torch.tensor([[0.25, 0.0, 0.0, 1.0]]))


def test_a_row_without_response_tokens_is_refused():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="at least one response token"):
        estimate_advantages(torch.zeros(2, 2), torch.zeros(2, 2), mask, gamma=1.0, gae_lambda=0.9)
    with pytest.raises(ValueError, match="at least one response token"):
        shape_rewards(torch.zeros(2), torch.zeros(2, 2), mask, kl_coef=0.1)


def test_rewards_are_the_kl_penalty_at_each_token_and_the_score_at_the_last_one():
    kl = torch.tensor([[9.0, 0.5, -1.0, 9.0], [9.0, 1.0, 2.0, 3.0]])
    mask = torch.tensor([[False, True, True, False], [False, True, True, True]])
    rewards = shape_rewards(torch.tensor([4.0, -2.0]), kl, mask, kl_coef=0.1)
    expected = [[0.0, -0.05, 4.1, 0.0], [0.0, -0.1, -0.2, -2.3]]
    assert_close(rewards, torch.tensor(expected))


def test_nan_kl_outside_the_response_does_not_leak_into_rewards():
    kl = torch.tensor([[math.nan, 0.5, math.nan]])
    mask = torch.tensor([[False, True, False]])
    assert_close(
        shape_rewards(torch.tensor([1.0]), kl, mask, kl_coef=0.2), torch.tensor([[0.0, 0.9, 0.0]])
    )


@given(
    scores=st.lists(NUMBER, min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
def test_without_decay_penalty_and_values_every_token_gets_its_responses_score(scores, lengths):
    # training.md, section 2, item 17; and with lambda 0.95 the end token still gets all of it.
    mask = torch.tensor([[False] + [t < n for t in range(5)] for n in lengths[: len(scores)]])
    rewards = shape_rewards(torch.tensor(scores), torch.ones(mask.shape), mask, kl_coef=0.0)
    none = torch.zeros(mask.shape)
    even = estimate_advantages(rewards, none, mask, gamma=1.0, gae_lambda=1.0).advantages
    assert_close(even, torch.tensor(scores)[:, None] * mask)
    decayed = estimate_advantages(rewards, none, mask, gamma=1.0, gae_lambda=0.95).advantages
    last = [decayed[row, lengths[row]].item() for row in range(len(scores))]
    assert last == pytest.approx(scores)


@given(rows=rows_with_gaps())
def test_whitened_numbers_have_mean_zero_and_population_variance_one(rows):
    _, values, mask = tensors(rows, filler=math.nan)
    before = [number for row in kept(values, mask) for number in row]
    mean = math.fsum(before) / len(before)
    variance = math.fsum((number - mean) ** 2 for number in before) / len(before)
    # Under this, float32's rounding of the mean shows, and the 1e-8 inside the root.
    assume(variance > 1e-3)
    whitened = whiten(values, mask)
    assert not whitened[~mask].any()
    numbers = [number for row in kept(whitened, mask) for number in row]
    assert math.fsum(numbers) / len(numbers) == pytest.approx(0, abs=1e-4)
    assert math.fsum(n**2 for n in numbers) / len(numbers) == pytest.approx(1, abs=1e-3)


def test_whitening_equal_numbers_gives_zeros():
    assert not whiten(torch.full((2, 2), 0.5), torch.ones(2, 2, dtype=torch.bool)).any()


def test_whitening_by_hand_uses_the_population_variance_of_the_whole_batch():
    # training.md, item 23 without its mean 1.6: deviations -.4 .. .4, variance 1/15.
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    whitened = whiten(values, torch.ones(3, 3, dtype=torch.bool))
    assert_close(whitened[0] + 1.6, torch.tensor([0.0508, 0.4381, 0.8254]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("num_masked", [1, 3])
def test_masked_tokens_anywhere_leave_the_other_advantages_as_they_are(num_masked):
    # training.md, item 27: an observation of n tokens between two turns of the same response.
    rewards, values = torch.tensor([[0.1, -0.2, 1.0]]), torch.tensor([[0.3, 0.5, -0.4]])
    plain = estimate_advantages(
        rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.9, gae_lambda=0.8
    )
    for place in range(4):
        apart = torch.full((1, num_masked), math.nan)
        mask = torch.ones(1, 3 + num_masked, dtype=torch.bool)
        mask[:, place : place + num_masked] = False
        longer = estimate_advantages(
            torch.cat([rewards[:, :place], apart, rewards[:, place:]], dim=1),
            torch.cat([values[:, :place], apart, values[:, place:]], dim=1),
            mask,
            gamma=0.9,
            gae_lambda=0.8,
        )
        assert longer.advantages[mask].tolist() == plain.advantages[0].tolist()
        assert longer.returns[mask].tolist() == plain.returns[0].tolist()


def test_advantages_stay_float32_and_do_not_learn_from_padding():
    values = torch.zeros(1, 2, requires_grad=True)
    mask = torch.tensor([[True, False]])
    found = estimate_advantages(torch.ones(1, 2), values, mask, gamma=0.5, gae_lambda=0.5)
    assert found.advantages.dtype == torch.float32
    found.advantages.sum().backward()
    assert values.grad.tolist() == [[-1.0, 0.0]]


def test_scaled_rewards_keep_their_mean():
    # training.md, item 23: the row that lm-human-preferences gives, not Bessel's .1394 .5046 .8697.
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    scaled = scale_keeping_mean(values, torch.ones(3, 3, dtype=torch.bool))
    assert_close(scaled[0], torch.tensor([0.0508, 0.4381, 0.8254]), rtol=0, atol=5e-5)
    assert scaled.mean().item() == pytest.approx(1.6, abs=1e-5)


@given(rows=rows_with_gaps())
def test_scaling_moves_nothing_but_the_spread_of_kept_numbers(rows):
    _, values, mask = tensors(rows, filler=math.nan)
    before = [number for row in kept(values, mask) for number in row]
    mean = math.fsum(before) / len(before)
    assume(statistics.pvariance(before) > 1e-3)
    scaled = scale_keeping_mean(values, mask)
    assert not scaled[~mask].any()
    after = [number for row in kept(scaled, mask) for number in row]
    expected = [mean + (number - mean) / statistics.pstdev(before) for number in before]
    assert after == pytest.approx(expected, abs=1e-3)


@st.composite
def groups_of_rewards(draw):
    """Rewards by prompt, two or more of each, and the order in which the rollouts stand."""
    reward = st.floats(-8, 8, width=32)
    groups = draw(st.lists(st.lists(reward, min_size=2, max_size=5), min_size=1, max_size=4))
    places = [(g, i) for g, rewards in enumerate(groups) for i in range(len(rewards))]
    return groups, draw(st.permutations(places))


@given(drawn=groups_of_rewards())
def test_rloo_is_the_reward_less_the_mean_of_the_others_of_its_prompt(drawn):
    groups, places = drawn
    found = rloo_advantages(
        torch.tensor([groups[g][i] for g, i in places]),
        torch.tensor([7 * g - 3 for g, _ in places]),
    )
    for (g, i), got in zip(places, found.tolist(), strict=True):
        others = groups[g][:i] + groups[g][i + 1 :]
        assert got == pytest.approx(groups[g][i] - math.fsum(others) / len(others), abs=1e-5)


@given(drawn=groups_of_rewards())
def test_grpo_is_the_reward_in_sample_deviations_of_its_prompt(drawn):
    groups, places = drawn
    found = grpo_advantages(
        torch.tensor([groups[g][i] for g, i in places]),
        torch.tensor([7 * g - 3 for g, _ in places]),
    )
    for (g, i), got in zip(places, found.tolist(), strict=True):
        mean, deviation = statistics.fmean(groups[g]), statistics.stdev(groups[g])
        expected = (groups[g][i] - mean) / (deviation + 1e-4)
        # Gaps of 16 are rounded to 1e-6, which the division magnifies.
        assert got == pytest.approx(expected, abs=1e-4 + 4e-6 / (deviation + 1e-4))


def test_both_by_hand():
    rewards, group = torch.tensor([1.0, 5.0, 2.0, 3.0, 6.0]), torch.tensor([0, 4, 0, 0, 4])
    # 1 - 2.5, 2 - 2, 3 - 1.5; 5 - 6 and 6 - 5.
    assert_close(rloo_advantages(rewards, group), torch.tensor([-1.5, -1.0, 0.0, 1.5, 1.0]))
    # Deviations 1, and sqrt(1/2).
    third = 0.5 / (math.sqrt(0.5) + 1e-4)
    expected = torch.tensor([-1 / 1.0001, -third, 0.0, 1 / 1.0001, third])
    assert_close(grpo_advantages(rewards, group), expected)


@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages])
def test_equal_rewards_of_a_prompt_are_worth_exactly_nothing(advantages):
    rewards = torch.tensor([0.1, 0.1, 0.1, 7.3, 7.3, 7.3])
    assert advantages(rewards, torch.tensor([0, 0, 0, 1, 1, 1])).tolist() == [0.0] * 6


@pytest.mark.parametrize("advantages", [rloo_advantages, grpo_advantages])
def test_a_response_with_nothing_to_be_compared_with_is_refused(advantages):
    with pytest.raises(ValueError, match="group 5 has one response"):
        advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 5, 0]))


def test_every_kept_token_gets_its_responses_advantage():
    mask = torch.tensor([[True, True, False], [False, False, True]])
    spread = spread_over_tokens(torch.tensor([1.5, -2.0]), mask)
    assert spread.tolist() == [[1.5, 1.5, 0.0], [0.0, 0.0, -2.0]]
