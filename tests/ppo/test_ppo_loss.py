"""Each loss by hand values and gradients; the likelihood of a ranking by its product of stages."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.ppo.loss import (
    apa_terms,
    distillation_terms,
    dpo_loss,
    importance_weights,
    is_gated,
    plackett_luce_dpo_loss,
    policy_terms,
    value_terms,
)

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


def test_without_a_clip_a_value_is_pulled_all_the_way():
    assert value(0.5, 0.0, 1.0, clip_range=None) == (0.125, False, -0.5)
    assert value(-3.0, 0.0, 1.0, clip_range=None) == (8.0, False, -4.0)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_padding_that_is_no_number_takes_no_gradient_into_the_critic(clip_range):
    values = torch.tensor([[0.1, math.nan]], requires_grad=True)
    no_numbers = torch.tensor([[0.0, math.nan]])
    mask = torch.tensor([[True, False]])
    terms = value_terms(values, no_numbers, no_numbers, mask, value_clip_range=clip_range)
    terms.loss.sum().backward()
    assert_close(terms.loss, torch.tensor([[0.005, 0.0]]))
    assert_close(values.grad, torch.tensor([[0.1, 0.0]]))


@pytest.mark.parametrize(
    ("now", "advantage", "apa_lambda", "loss"),
    [
        # Half a nat up, and an advantage of 2 asks for 2 / 4 = half a nat: there.
        (-0.5, 2.0, 4.0, 0.0),
        # Not yet moved: the whole way to go, up or down.
        (-1.0, 2.0, 1.0, 4.0),
        (-1.0, -2.0, 1.0, 4.0),
        # 0.5 - 2 and 0.5 + 2, squared: far off is not clipped.
        (-0.5, 2.0, 1.0, 2.25),
        (-0.5, -2.0, 1.0, 6.25),
        # lambda 0.1, as in the paper's code: ten times the advantage.
        (-1.0, 0.3, 0.1, 9.0),
    ],
)
def test_apa_is_the_squared_distance_to_the_advantage_over_lambda(now, advantage, apa_lambda, loss):
    logprobs = torch.tensor([[now, 5.0]], requires_grad=True)
    terms = apa_terms(
        logprobs,
        torch.tensor([[-1.0, math.nan]]),
        torch.tensor([[advantage, math.nan]]),
        torch.tensor([[True, False]]),
        apa_lambda=apa_lambda,
    )
    terms.loss.sum().backward()
    assert_close(terms.loss, torch.tensor([[loss, 0.0]]))
    assert terms.is_clipped.tolist() == [[False, False]]
    slope = 2 * (now + 1 - advantage / apa_lambda)
    assert_close(logprobs.grad, torch.tensor([[slope, 0.0]]))


def test_importance_weights_are_capped_have_no_gradient_and_count_nothing_outside():
    old = torch.tensor([[math.log(0.5), math.log(0.3), -1.0, math.nan]], requires_grad=True)
    sampler = torch.tensor([[math.log(0.4), math.log(0.1), -1.0, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    weights = importance_weights(old, sampler, mask, cap=2.0)
    # .5 / .4, .3 / .1 = 3 above the cap, equal, and a masked token.
    assert_close(weights, torch.tensor([[1.25, 2.0, 1.0, 0.0]]))
    assert not weights.requires_grad


def test_dpo_of_a_pair_by_hand():
    pairs = [torch.tensor([number]) for number in (-10.0, -12.0, -11.0, -11.5)]
    # Log ratios 1 and -0.5: a margin of 1.5, times beta.
    found = dpo_loss(*pairs, beta=0.1)
    assert_close(found, torch.tensor([math.log1p(math.exp(-0.15))]))
    even = torch.tensor([-3.0])
    assert_close(dpo_loss(even, even, even, even, beta=0.1), torch.tensor([math.log(2)]))


def test_dpo_raises_the_chosen_and_lowers_the_rejected_the_more_the_worse_they_stand():
    chosen = torch.tensor([-10.0, -10.0], requires_grad=True)
    rejected = torch.tensor([-12.0, -9.0], requires_grad=True)
    reference = torch.tensor([-10.0, -10.0])
    dpo_loss(chosen, rejected, reference, reference, beta=0.5).sum().backward()
    # eq. 7's gradient: -beta sigmoid(beta (rejected's ratio - chosen's)).
    slopes = [-0.5 / (1 + math.exp(1.0)), -0.5 / (1 + math.exp(-0.5))]
    assert_close(chosen.grad, torch.tensor(slopes))
    assert_close(rejected.grad, -torch.tensor(slopes))


def likelihood_of_a_ranking(scores, ranks):
    """-log of the product of stages, each a choice among what is left; a tie after Efron."""
    total = 0.0
    for rank in sorted({rank for rank in ranks if rank < math.inf}):
        tie = [math.exp(s) for s, r in zip(scores, ranks, strict=True) if r == rank]
        rest = math.fsum(math.exp(s) for s, r in zip(scores, ranks, strict=True) if r > rank)
        for nth, picked in enumerate(tie):
            total -= math.log(picked / (rest + (1 - nth / len(tie)) * math.fsum(tie)))
    return total


ANSWER = st.tuples(
    st.floats(-30, 0, width=32),
    st.floats(-30, 0, width=32),
    st.sampled_from([1.0, 2.0, 3.0, 4.0, math.inf]),
    st.booleans(),
)


def is_a_ranking(row):
    kept = [rank for _, _, rank, keep in row if keep]
    return len(kept) > 1 and min(kept) < math.inf


@given(rows=st.lists(st.lists(ANSWER, min_size=5, max_size=5).filter(is_a_ranking), max_size=3))
def test_plackett_luce_dpo_is_the_likelihood_of_the_whole_ranking(rows):
    rows = rows or [[(-1.0, -2.0, 1.0, True), (-3.0, -2.0, math.inf, True)]]
    columns = [
        torch.tensor(column) for column in zip(*[zip(*r, strict=True) for r in rows], strict=True)
    ]
    logprobs, reference, ranks, mask = columns
    logprobs = torch.where(mask, logprobs, math.nan).double()
    found = plackett_luce_dpo_loss(logprobs, reference.double(), ranks.double(), mask, beta=0.3)
    for row, got in zip(rows, found.tolist(), strict=True):
        kept = [(0.3 * (now - ref), rank) for now, ref, rank, keep in row if keep]
        assert got == pytest.approx(likelihood_of_a_ranking(*zip(*kept, strict=True)), abs=1e-9)


def test_seven_answers_that_the_policy_did_not_move_cost_the_log_of_their_orders():
    # training.md, item 7: ln 7! nats.
    same = torch.full((1, 7), -20.0)
    ranks = torch.tensor([[3.0, 1.0, 7.0, 2.0, 5.0, 4.0, 6.0]])
    found = plackett_luce_dpo_loss(same, same, ranks, ranks > 0, beta=0.1)
    assert found.item() == pytest.approx(8.525161, abs=1e-5)


def test_plackett_luce_of_two_is_dpo():
    logprobs = torch.tensor([[-10.0, -12.0], [-7.0, -3.0]])
    reference = torch.tensor([[-11.0, -11.5], [-6.0, -6.0]])
    ranks = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    found = plackett_luce_dpo_loss(logprobs, reference, ranks, ranks > 0, beta=0.7)
    # Margins by hand: 1 + 0.5, and 3 + 1.
    expected = [math.log1p(math.exp(-0.7 * margin)) for margin in (1.5, 4.0)]
    assert_close(found, torch.tensor(expected))


def test_far_apart_logprobs_of_whole_responses_stay_finite_with_their_gradient():
    logprobs = torch.tensor([[-4000.0, -1.0, math.nan]], requires_grad=True)
    ranks = torch.tensor([[1.0, 2.0, math.inf]])
    mask = torch.tensor([[True, True, False]])
    found = plackett_luce_dpo_loss(logprobs, torch.zeros(1, 3), ranks, mask, beta=1.0)
    found.sum().backward()
    assert found.item() == pytest.approx(3999.0)
    assert logprobs.grad.tolist() == [[-1.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("ranks", "mask"),
    [([1.0, 2.0], [True, False]), ([math.inf, math.inf], [True, True])],
)
def test_a_row_that_ranks_nothing_is_refused(ranks, mask):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="two answers, one of them ranked"):
        plackett_luce_dpo_loss(zeros, zeros, torch.tensor([ranks]), torch.tensor([mask]), beta=0.1)


def test_distillation_is_cross_entropy_of_kept_tokens():
    logprobs = torch.tensor([[-0.5, -2.0, math.nan]], requires_grad=True)
    terms = distillation_terms(logprobs, torch.tensor([[True, True, False]]))
    assert terms.tolist() == [[0.5, 2.0, 0.0]]
    terms.sum().backward()
    assert logprobs.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_the_gate_is_shut_only_above_its_number():
    assert is_gated(1.01, 1.0)
    assert not is_gated(1.0, 1.0)
    assert not is_gated(0.2, 1.0)
    assert not is_gated(1e9, None)
