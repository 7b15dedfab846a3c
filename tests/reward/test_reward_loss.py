"""The K-wise loss against Plackett-Luce's own product, hand values and its symmetries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.reward.loss import UNRANKED, plackett_luce_loss

LN_7_FACTORIAL = 8.525161  # training.md, section 2, item 7


def loss_of(scores, ranks):
    """One full row's loss."""
    row = torch.tensor([scores], dtype=torch.float32)
    return plackett_luce_loss(row, torch.tensor([ranks]), torch.ones(row.shape, dtype=torch.bool))[
        0
    ]


def loss_by_definition(scores, ranks):
    """-log of the product over stages, in Python floats; ranks as in the loss.

    The best tie is picked first, from everything. Efron: within a tie of d, its l-th denominator
    has lost l/d of the tie's own weight.
    """
    likelihood = 1.0
    for rank in sorted({rank for rank in ranks if rank != UNRANKED}):
        tie = [math.exp(s) for s, r in zip(scores, ranks, strict=True) if r == rank]
        below = [
            math.exp(s) for s, r in zip(scores, ranks, strict=True) if r == UNRANKED or r > rank
        ]
        for number, weight in enumerate(tie):
            remaining = math.fsum(below) + math.fsum(tie) * (1 - number / len(tie))
            likelihood *= weight / remaining
    return -math.log(likelihood) / (len(scores) - 1)


@st.composite
def ranked_rows(draw):
    """Rows of (score, rank), 2 to 6 answers each; ranks may tie or be missing, not all of them."""
    answer = st.tuples(st.floats(-5, 5, width=32), st.integers(UNRANKED, 4))
    row = st.lists(answer, min_size=2, max_size=6).filter(
        lambda answers: any(rank != UNRANKED for _, rank in answers)
    )
    return draw(st.lists(row, min_size=1, max_size=4))


def padded(rows, extra=0, score=0.0, rank=UNRANKED):
    """Tensors of ragged rows; what stands in the padding is the caller's choice."""
    width = max(len(row) for row in rows) + extra
    filled = [row + [(score, rank)] * (width - len(row)) for row in rows]
    keep = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    scores = torch.tensor([[s for s, _ in row] for row in filled], dtype=torch.float32)
    return scores, torch.tensor([[r for _, r in row] for row in filled]), torch.tensor(keep)


def test_seven_equal_scores_cost_ln_of_seven_factorial_over_six_stages():
    assert_close(loss_of([0.3] * 7, [4, 1, 7, 2, 6, 3, 5]), torch.tensor(LN_7_FACTORIAL / 6))
    assert loss_of([0.0] * 7, [1, 2, 3, 4, 5, 6, 7]).item() == pytest.approx(1.420860, abs=1e-6)


def test_a_hand_value_of_three_answers():
    # Weights 1, 2, 3, ranked 3rd, 1st, 2nd: (2/6) (3/4) (1/1) = 1/4, over K - 1 = 2.
    loss = loss_of([0.0, math.log(2), math.log(3)], [3, 1, 2])
    assert_close(loss, torch.tensor(math.log(4) / 2))


def test_one_winner_among_unranked_answers_is_a_softmax():
    # Weights 1, 2, 5; only the second is ranked: 2/8, over K - 1 = 2.
    loss = loss_of([0.0, math.log(2), math.log(5)], [UNRANKED, 1, UNRANKED])
    assert_close(loss, torch.tensor(math.log(4) / 2))


# Half a unit in the last place of a float32 between 1 and 2 is 0.6e-7; the loss rounds twice.
@pytest.mark.parametrize("difference", [-0.5, 0.0, 0.25, 1.0, 4.0])
def test_two_answers_are_bradley_terry(difference):
    expected = math.log1p(math.exp(-difference))  # -logsigmoid
    assert loss_of([difference, 0.0], [1, 2]).item() == pytest.approx(expected, rel=0, abs=1.2e-7)
    assert loss_of([0.0, difference], [2, 1]).item() == pytest.approx(expected, rel=0, abs=1.2e-7)
    assert_close(loss_of([1.5 + difference, 1.5], [1, 2]), torch.tensor(expected))


@given(rows=ranked_rows(), extra=st.integers(0, 3))
def test_it_is_the_product_over_stages_for_ragged_partial_and_tied_rankings(rows, extra):
    expected = [loss_by_definition(*zip(*row, strict=True)) for row in rows]
    assert_close(plackett_luce_loss(*padded(rows, extra)), torch.tensor(expected))


def test_a_tie_of_two_equal_scores_costs_ln_two():
    # Efron: (1/2) (1/1).
    assert_close(loss_of([2.0, 2.0], [1, 1]), torch.tensor(math.log(2)))


def test_a_tie_of_all_seven_costs_what_any_order_of_equal_scores_does():
    assert_close(6 * loss_of([0.7] * 7, [1] * 7), torch.tensor(LN_7_FACTORIAL))


def test_a_tie_below_the_best_is_worked_out_by_hand():
    # Weights 4, 1, 3; the last two tie: (4/8) (1/4) (3/2) = 3/16, over 2.
    loss = loss_of([math.log(4), 0.0, math.log(3)], [1, 2, 2])
    assert_close(loss, torch.tensor(-math.log(3 / 16) / 2))


def test_the_order_inside_a_tie_does_not_matter():
    expected = loss_of([0.2, 1.4, -0.9, 0.5], [1, 2, 2, 2])
    for order in ([0, 2, 1, 3], [0, 3, 2, 1], [3, 2, 0, 1]):
        scores = [[0.2, 1.4, -0.9, 0.5][i] for i in order]
        assert_close(loss_of(scores, [[1, 2, 2, 2][i] for i in order]), expected)


@given(rows=ranked_rows(), shift=st.floats(-20, 20, width=32))
def test_adding_a_constant_to_all_scores_changes_nothing(rows, shift):
    scores, ranks, keep = padded(rows)
    # float32 holds a sum of 25 to 2e-6, and a row adds up six stages of such.
    assert_close(
        plackett_luce_loss(scores + shift, ranks, keep),
        plackett_luce_loss(scores, ranks, keep),
        rtol=1e-5,
        atol=2e-5,
    )


@given(rows=ranked_rows())
def test_the_gradient_of_each_row_sums_to_zero_and_padding_gets_none(rows):
    scores, ranks, keep = padded(rows, extra=2, score=3.0, rank=1)
    scores.requires_grad_()
    plackett_luce_loss(scores, ranks, keep).sum().backward()
    assert_close(scores.grad.sum(dim=1), torch.zeros(len(rows)))
    assert not scores.grad[~keep].any()


def test_a_better_answer_is_pulled_up_and_a_worse_one_down():
    scores = torch.zeros(1, 3, requires_grad=True)
    plackett_luce_loss(
        scores, torch.tensor([[2, 1, 3]]), torch.ones(1, 3, dtype=torch.bool)
    ).sum().backward()
    # By hand: stages pick 1 of 3 and 1 of 2; d/ds = (sum of shares - picks) / 2.
    assert_close(scores.grad, torch.tensor([[-1 / 12, -1 / 3, 5 / 12]]))


@pytest.mark.parametrize("ranks", [[1, 2, 3], [3, 2, 1], [1, 1, 2], [1, UNRANKED, UNRANKED]])
# Of 80 float32 still holds the exponential, of 120 it does not.
@pytest.mark.parametrize("size", [80.0, 120.0])
def test_large_scores_stay_finite_in_value_and_gradient(ranks, size):
    scores = torch.tensor([[size, 0.0, -size]], requires_grad=True)
    loss = plackett_luce_loss(scores, torch.tensor([ranks]), torch.ones(1, 3, dtype=torch.bool))
    loss.sum().backward()
    assert_close(loss, torch.tensor([loss_by_definition([size, 0.0, -size], ranks)]))
    assert torch.isfinite(scores.grad).all()


@given(rows=ranked_rows(), seed=st.integers(0, 2**31))
def test_permuting_the_answers_with_their_ranks_changes_nothing(rows, seed):
    scores, ranks, keep = padded(rows, extra=1)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_close(
        plackett_luce_loss(scores[:, order], ranks[:, order], keep[:, order]),
        plackett_luce_loss(scores, ranks, keep),
    )


@given(
    rows=ranked_rows(),
    extra=st.integers(1, 4),
    score=st.floats(-1e4, 1e4, width=32),
    rank=st.integers(UNRANKED, 5),
)
def test_padding_changes_nothing_whatever_stands_in_it(rows, extra, score, rank):
    assert_close(
        plackett_luce_loss(*padded(rows, extra, score, rank)), plackett_luce_loss(*padded(rows))
    )


def test_gaps_between_rank_numbers_do_not_count():
    assert_close(loss_of([0.1, 0.9, 0.4], [10, 20, 30]), loss_of([0.1, 0.9, 0.4], [1, 2, 3]))


@pytest.mark.parametrize(
    ("ranks", "keep"),
    [
        ([1, 2], [True, False]),
        ([1, 2], [False, False]),
        ([UNRANKED, UNRANKED], [True, True]),
        ([UNRANKED, UNRANKED, 1], [True, True, False]),
    ],
)
def test_a_row_without_two_answers_or_without_a_rank_is_refused(ranks, keep):
    good = [(0.0, 1), (1.0, 2)]
    scores, all_ranks, all_keep = padded([good, [(0.0, rank) for rank in ranks]])
    all_keep[1, : len(keep)] = torch.tensor(keep)
    with pytest.raises(ValueError, match="two answers, one of them ranked"):
        plackett_luce_loss(scores, all_ranks, all_keep)
