"""The losses of a ranking against their definitions, hand values and their symmetries."""

import math
from functools import partial
from itertools import permutations

import choix
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.reward.loss import (
    UNRANKED,
    best_of_k_loss,
    bradley_terry_loss,
    centring,
    plackett_luce_loss,
)

LN_7_FACTORIAL = 8.525161  # training.md, section 2, item 7


LOSSES = {
    "plackett-luce": plackett_luce_loss,
    "breslow": partial(plackett_luce_loss, ties="breslow"),
    "all pairs": bradley_terry_loss,
    "adjacent pairs": partial(bradley_terry_loss, adjacent=True),
    "best of K": best_of_k_loss,
}
any_loss = st.sampled_from(list(LOSSES.values()))
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def loss_of(scores, ranks, loss=plackett_luce_loss, dtype=torch.float32):
    """One full row's loss."""
    row = torch.tensor([scores], dtype=dtype)
    return loss(row, torch.tensor([ranks]), torch.ones(row.shape, dtype=torch.bool))[0]


def worth(rank):
    return math.inf if rank == UNRANKED else rank


def pairs_by_definition(scores, ranks, adjacent=False):
    """Mean of -log sigmoid over the pairs, in Python floats; 0 without any."""
    places = [worth(rank) for rank in ranks]
    losses = [
        math.log1p(math.exp(scores[j] - scores[i]))
        for i, j in permutations(range(len(scores)), 2)
        if places[i] < places[j]
        and not (adjacent and any(places[i] < place < places[j] for place in places))
    ]
    return math.fsum(losses) / max(1, len(losses))


def best_by_definition(scores, ranks):
    """Cross-entropy between equal shares for the best and the softmax, in Python floats."""
    total = math.fsum(math.exp(score) for score in scores)
    best = min(worth(rank) for rank in ranks)
    shares = [math.exp(s) / total for s, r in zip(scores, ranks, strict=True) if r == best]
    return -math.fsum(math.log(share) for share in shares) / len(shares)


def loss_by_definition(scores, ranks, ties="efron"):
    """-log of the product over stages, in Python floats; ranks as in the loss.

    The best tie is picked first, from everything. Efron: within a tie of d, its l-th denominator
    has lost l/d of the tie's own weight. Breslow: it has lost nothing.
    """
    likelihood = 1.0
    for rank in sorted({rank for rank in ranks if rank != UNRANKED}):
        tie = [math.exp(s) for s, r in zip(scores, ranks, strict=True) if r == rank]
        below = [
            math.exp(s) for s, r in zip(scores, ranks, strict=True) if r == UNRANKED or r > rank
        ]
        for number, weight in enumerate(tie):
            left = 1 - number / len(tie) if ties == "efron" else 1
            remaining = math.fsum(below) + math.fsum(tie) * left
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


def padded(rows, extra=0, score=0.0, rank=UNRANKED, dtype=torch.float32):
    """Tensors of ragged rows; what stands in the padding is the caller's choice."""
    width = max(len(row) for row in rows) + extra
    filled = [row + [(score, rank)] * (width - len(row)) for row in rows]
    keep = [[True] * len(row) + [False] * (width - len(row)) for row in rows]
    scores = torch.tensor([[s for s, _ in row] for row in filled], dtype=dtype)
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


@every_loss
@pytest.mark.parametrize("difference", [-0.5, 0.0, 0.25, 1.0, 4.0])
@pytest.mark.parametrize("lower", [0.0, 1.5, -80.0])
def test_two_answers_are_bradley_terry(loss, difference, lower):
    expected = math.log1p(math.exp(-difference))  # -logsigmoid
    scores = [lower + difference, lower]
    assert loss_of(scores, [1, 2], loss).item() == pytest.approx(expected, rel=0, abs=1e-7)
    assert loss_of(scores[::-1], [2, 1], loss).item() == pytest.approx(expected, rel=0, abs=1e-7)


@pytest.mark.parametrize(
    ("loss", "definition"),
    [
        ("plackett-luce", loss_by_definition),
        ("breslow", partial(loss_by_definition, ties="breslow")),
        ("all pairs", pairs_by_definition),
        ("adjacent pairs", partial(pairs_by_definition, adjacent=True)),
        ("best of K", best_by_definition),
    ],
)
@given(rows=ranked_rows(), extra=st.integers(0, 3))
def test_each_is_its_definition_for_ragged_partial_and_tied_rankings(loss, definition, rows, extra):
    expected = [definition(*zip(*row, strict=True)) for row in rows]
    scores, ranks, keep = padded(rows, extra, dtype=torch.float64)
    exact = torch.tensor(expected, dtype=torch.float64)
    assert_close(LOSSES[loss](scores, ranks, keep), exact, rtol=1e-9, atol=1e-9)
    assert_close(LOSSES[loss](scores.float(), ranks, keep), exact.float())


def test_a_tie_of_two_equal_scores_costs_ln_two_and_breslow_counts_it_twice():
    # Efron: (1/2) (1/1); Breslow: (1/2) (1/2).
    assert loss_of([2.0, 2.0], [1, 1]).item() == pytest.approx(0.6931, abs=5e-5)
    assert loss_of([2.0, 2.0], [1, 1], LOSSES["breslow"]).item() == pytest.approx(1.3863, abs=5e-5)


def test_adjacent_pairs_skip_what_another_answer_stands_between():
    # Weights 1, 2, 4, best last: 4 beats 2 and 2 beats 1, each at odds of 2 to 1; not 4 beats 1.
    scores, ranks = [0.0, math.log(2), math.log(4)], [3, 2, 1]
    assert_close(loss_of(scores, ranks, LOSSES["adjacent pairs"]), torch.tensor(math.log(3 / 2)))
    everything = (2 * math.log(3 / 2) + math.log(5 / 4)) / 3
    assert_close(loss_of(scores, ranks, bradley_terry_loss), torch.tensor(everything))


def test_a_row_that_is_one_tie_has_no_pair_and_no_gradient():
    scores = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    row = (scores, torch.tensor([[1, 1, 1]]), torch.ones(1, 3, dtype=torch.bool))
    for adjacent in (False, True):
        loss = bradley_terry_loss(*row, adjacent=adjacent)
        loss.sum().backward()
        assert loss.item() == 0
    assert not scores.grad.any()


def test_the_best_of_k_is_a_softmax_in_which_equals_share():
    # Weights 1, 2, 5.
    scores = [0.0, math.log(2), math.log(5)]
    assert_close(loss_of(scores, [2, 1, 3], best_of_k_loss), torch.tensor(math.log(4)))
    shared = -(math.log(2 / 8) + math.log(5 / 8)) / 2
    assert_close(loss_of(scores, [2, 1, 1], best_of_k_loss), torch.tensor(shared))


def test_centring_is_the_square_of_the_kept_sum_over_k_less_one():
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, -3.0, 99.0], [4.0, -4.0, torch.nan]])
    keep = torch.tensor([[True, True, True], [True, True, False], [True, True, False]])
    assert centring(scores, keep).tolist() == [18.0, 4.0, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_fitted_utilities_are_those_of_choix(seed):
    draw = np.random.default_rng(seed)
    orders = [draw.permutation(5)[: draw.integers(2, 6)] for _ in range(30)]
    utilities = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    width = max(map(len, orders))
    filled = torch.tensor([[*order, *[0] * (width - len(order))] for order in orders])
    keep = torch.arange(width) < torch.tensor([[len(order)] for order in orders])
    ranks = torch.arange(1, width + 1).expand(len(orders), width)
    optimizer = torch.optim.LBFGS(
        [utilities],
        line_search_fn="strong_wolfe",
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-14,
    )

    def closure():
        optimizer.zero_grad()
        # choix adds up stages; here each ranking's are divided by their number.
        losses = plackett_luce_loss(utilities[filled], ranks, keep) * (keep.sum(dim=1) - 1)
        loss = losses.sum() / len(orders)
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = utilities.detach().numpy()
    theirs = choix.ilsr_rankings(5, orders, tol=1e-12)
    assert np.abs((fitted - fitted.mean()) - (theirs - theirs.mean())).max() < 1e-5


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


@given(loss=any_loss, rows=ranked_rows(), shift=st.floats(-20, 20, width=32))
def test_adding_a_constant_to_all_scores_changes_nothing(loss, rows, shift):
    scores, ranks, keep = padded(rows)
    # float32 holds a sum of 25 to 2e-6, and a row adds up six stages of such.
    assert_close(
        loss(scores + shift, ranks, keep),
        loss(scores, ranks, keep),
        rtol=1e-5,
        atol=2e-5,
    )


@given(loss=any_loss, rows=ranked_rows(), score=st.sampled_from([3.0, math.inf, math.nan]))
def test_the_gradient_of_each_row_sums_to_zero_and_padding_gets_none(loss, rows, score):
    scores, ranks, keep = padded(rows, extra=2, score=score, rank=1)
    scores.requires_grad_()
    loss(scores, ranks, keep).sum().backward()
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
    for name, loss in LOSSES.items():
        scores = torch.tensor([[size, 0.0, -size]], requires_grad=True)
        losses = loss(scores, torch.tensor([ranks]), torch.ones(1, 3, dtype=torch.bool))
        losses.sum().backward()
        assert torch.isfinite(scores.grad).all(), name
        assert torch.isfinite(losses).all(), name
        if name == "plackett-luce":
            assert_close(losses, torch.tensor([loss_by_definition([size, 0.0, -size], ranks)]))


@every_loss
def test_half_precision_scores_are_counted_in_float32(loss):
    scores = [0.1, 0.7, -0.4]
    exact = loss_of(torch.tensor(scores, dtype=torch.bfloat16).tolist(), [2, 1, 3], loss)
    assert_close(loss_of(scores, [2, 1, 3], loss, torch.bfloat16), exact)


@given(loss=any_loss, rows=ranked_rows(), seed=st.integers(0, 2**31))
def test_permuting_the_answers_with_their_ranks_changes_nothing(loss, rows, seed):
    scores, ranks, keep = padded(rows, extra=1)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(seed))
    assert_close(
        loss(scores[:, order], ranks[:, order], keep[:, order]),
        loss(scores, ranks, keep),
    )


@given(
    loss=any_loss,
    rows=ranked_rows(),
    extra=st.integers(1, 4),
    score=st.floats(-1e4, 1e4, width=32),
    rank=st.integers(UNRANKED, 5),
)
def test_padding_changes_nothing_whatever_stands_in_it(loss, rows, extra, score, rank):
    assert_close(loss(*padded(rows, extra, score, rank)), loss(*padded(rows)))


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
@every_loss
def test_a_row_without_two_answers_or_without_a_rank_is_refused(loss, ranks, keep):
    good = [(0.0, 1), (1.0, 2)]
    scores, all_ranks, all_keep = padded([good, [(0.0, rank) for rank in ranks]])
    all_keep[1, : len(keep)] = torch.tensor(keep)
    with pytest.raises(ValueError, match="two answers, one of them ranked"):
        loss(scores, all_ranks, all_keep)
