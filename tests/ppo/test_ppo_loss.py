"""The clipped losses, term by term: hand values for each sign and side, and their gradients."""

import math

import pytest
import torch
from torch.testing import assert_close

from starling.ppo.loss import policy_terms, value_terms

ONE = torch.ones(1, 1, dtype=torch.bool)


def policy(logprob, old, advantage, clip_range=0.2):
    """Loss, whether it is clipped, and the gradient by the new logprob, of one token."""
    now = torch.tensor([[logprob]], requires_grad=True)
    terms = policy_terms(
        now, torch.tensor([[old]]), torch.tensor([[advantage]]), ONE, clip_range=clip_range
    )
    terms.loss.sum().backward()
    return terms.loss.item(), terms.is_clipped.item(), now.grad.item()


def value(now, old, target, clip_range=0.2):
    """The same of one value."""
    values = torch.tensor([[now]], requires_grad=True)
    terms = value_terms(
        values, torch.tensor([[old]]), torch.tensor([[target]]), ONE, value_clip_range=clip_range
    )
    terms.loss.sum().backward()
    return terms.loss.item(), terms.is_clipped.item(), values.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        # Better than thought, and already 1.5 times as likely: clipped at 1.2.
        (1.5, 2.0, -2.4, True),
        # Better, and less likely than before: free to come back.
        (0.5, 2.0, -1.0, False),
        # Worse, and more likely than before: free to come down.
        (1.5, -2.0, 3.0, False),
        # Worse, and already half as likely: clipped at 0.8.
        (0.5, -2.0, 1.6, True),
        # Inside the range nothing is clipped, whatever the sign.
        (1.1, 2.0, -2.2, False),
        (1.1, -2.0, 2.2, False),
        (0.9, 2.0, -1.8, False),
        (0.9, -2.0, 1.8, False),
        (1.0, 3.0, -3.0, False),
    ],
)
def test_policy_terms_by_sign_and_ratio(ratio, advantage, loss, is_clipped):
    got, clipped, gradient = policy(-1.0 + math.log(ratio), -1.0, advantage)
    assert got == pytest.approx(loss, rel=1e-5)
    assert clipped is is_clipped
    # d(-A r)/dlogprob = -A r, and none where the clip holds.
    assert gradient == pytest.approx(0.0 if is_clipped else -advantage * ratio, rel=1e-5)


def test_the_ratio_e_is_clipped_for_a_good_token_only():
    # The case that torchtune's test had wrong: +A and -A are not mirror images.
    assert policy(0.0, -1.0, 1.0)[0] == pytest.approx(-1.2)
    assert policy(0.0, -1.0, -1.0)[0] == pytest.approx(math.e)


def test_the_clip_range_is_the_one_that_is_given():
    assert policy(0.0, -1.0, 1.0, clip_range=0.5)[0] == pytest.approx(-1.5)


@pytest.mark.parametrize(
    ("now", "old", "target", "loss", "is_clipped"),
    [
        # Moved by 0.5 towards the target: only 0.2 counts, and the gradient is gone.
        (0.5, 0.0, 1.0, 0.5 * 0.8**2, True),
        # Moved by 0.5 away: the larger error counts, and pulls back.
        (-0.5, 0.0, 1.0, 0.5 * 1.5**2, False),
        # Moved by 0.1: as without a clip.
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, False),
        # Past the target: clipped value 0.2 is further off than 0.25.
        (0.25, 0.0, 0.3, 0.5 * 0.1**2, True),
        # Downwards.
        (-0.5, 0.0, -1.0, 0.5 * 0.8**2, True),
    ],
)
def test_value_terms_by_hand(now, old, target, loss, is_clipped):
    got, clipped, gradient = value(now, old, target)
    assert got == pytest.approx(loss, rel=1e-5)
    assert clipped is is_clipped
    assert gradient == pytest.approx(0.0 if is_clipped else now - target, rel=1e-5)


def test_the_value_clip_stands_around_the_old_value():
    assert value(3.5, 3.0, 4.0)[0] == pytest.approx(0.5 * 0.8**2, rel=1e-5)


def test_masked_tokens_have_no_loss_no_clip_and_no_gradient():
    mask = torch.tensor([[True, False]])
    logprobs = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    terms = policy_terms(
        logprobs,
        torch.tensor([[-1.0, -500.0]]),
        torch.tensor([[1.0, math.nan]]),
        mask,
        clip_range=0.2,
    )
    terms.loss.sum().backward()
    assert_close(terms.loss, torch.tensor([[-1.0, 0.0]]))
    assert terms.is_clipped.tolist() == [[False, False]]
    assert_close(logprobs.grad, torch.tensor([[-1.0, 0.0]]))
    values = torch.tensor([[1.0, 50.0]], requires_grad=True)
    terms = value_terms(
        values, torch.zeros(1, 2), torch.tensor([[1.5, -50.0]]), mask, value_clip_range=9.0
    )
    terms.loss.sum().backward()
    assert_close(terms.loss, torch.tensor([[0.125, 0.0]]))
    assert terms.is_clipped.tolist() == [[False, False]]
    assert_close(values.grad, torch.tensor([[-0.5, 0.0]]))


def test_terms_are_per_token_so_that_the_caller_decides_what_to_divide_by():
    ones = torch.ones(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    terms = policy_terms(ones, ones, ones, mask, clip_range=0.2)
    assert_close(terms.loss.sum(), torch.tensor(-4.0))
