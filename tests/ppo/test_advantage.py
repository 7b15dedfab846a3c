"""GAE against the paper's double sum and hand values; rewards and whitening by property."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.ppo.advantage import estimate_advantages, shape_rewards, whiten

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
