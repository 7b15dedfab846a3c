import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from starling.base.masked import masked_mean, masked_sum, masked_var

REDUCTIONS = [masked_sum, masked_mean, masked_var]


@st.composite
def kept_and_masked(draw):
    """Rows of (value, kept) of one length, each with at least one kept."""
    width = draw(st.integers(1, 6))
    value = st.floats(-100, 100, width=32)
    rows = st.lists(st.tuples(value, st.booleans()), min_size=width, max_size=width).filter(
        lambda row: any(kept for _, kept in row)
    )
    return draw(st.lists(rows, min_size=1, max_size=4))


def tensors(rows, filler=math.nan):
    values = [[value if kept else filler for value, kept in row] for row in rows]
    mask = [[kept for _, kept in row] for row in rows]
    return torch.tensor(values, dtype=torch.float64), torch.tensor(mask)


def by_definition(kept):
    total = math.fsum(kept)
    mean = total / len(kept)
    return total, mean, math.fsum((value - mean) ** 2 for value in kept) / len(kept)


@settings(deadline=None)
@given(rows=kept_and_masked())
def test_all_kept_entries_are_reduced_as_defined_and_masked_nan_does_not_leak(rows):
    values, mask = tensors(rows)
    kept = [value for row in rows for value, is_kept in row if is_kept]
    for reduce, expected in zip(REDUCTIONS, by_definition(kept), strict=True):
        assert_close(reduce(values, mask).item(), expected)


@settings(deadline=None)
@given(rows=kept_and_masked())
def test_each_row_is_summed_on_its_own_along_a_dimension(rows):
    values, mask = tensors(rows, filler=math.inf)
    sums = [by_definition([value for value, kept in row if kept])[0] for row in rows]
    wanted = torch.tensor(sums, dtype=torch.float64)
    assert_close(masked_sum(values, mask, dim=1), wanted)
    assert_close(masked_sum(values, mask, dim=-1), wanted)
    assert_close(masked_sum(values.T, mask.T, dim=0), wanted)


def test_hand_values():
    values = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # Kept: 1, 2, 6. Sum 9, mean 3, squared deviations 4 + 1 + 9 = 14, over 3.
    assert_close(masked_sum(values, mask), torch.tensor(9.0))
    assert_close(masked_mean(values, mask), torch.tensor(3.0))
    assert_close(masked_var(values, mask), torch.tensor(14 / 3))
    assert_close(masked_sum(values, mask, dim=1), torch.tensor([3.0, 6.0]))


@pytest.mark.parametrize("reduce", [*REDUCTIONS, partial(masked_sum, dim=1)])
def test_gradients_are_finite_and_zero_where_masked_out(reduce):
    values = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 5.0, 5.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    reduce(values, mask).sum().backward()
    assert values.grad.isfinite().all()
    assert (values.grad[~mask] == 0).all()
    if reduce is masked_sum:
        assert (values.grad[mask] == 1).all()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_kept_nan_is_not_hidden(reduce):
    assert reduce(torch.tensor([1.0, math.nan]), torch.tensor([True, True])).isnan()


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_keeping_nothing_is_an_error(reduce):
    values = torch.ones(2, 3)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    with pytest.raises(ValueError, match="the mask keeps nothing"):
        reduce(values, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="the mask keeps nothing"):
        reduce(torch.ones(0), torch.ones(0, dtype=torch.bool))
    with pytest.raises(ValueError, match="a slice keeps nothing"):
        masked_sum(values, mask, dim=1)
    reduce(values, mask)
    masked_sum(values, mask, dim=0)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_mask_of_numbers_or_of_another_shape_is_an_error(reduce):
    with pytest.raises(TypeError):
        reduce(torch.ones(3), torch.ones(3))
    # ValueError by itself, a TypeError where jaxtyping checks calls.
    with pytest.raises((ValueError, TypeError)):
        reduce(torch.ones(2, 3), torch.ones(3, dtype=torch.bool))


def test_half_precision_is_summed_in_float32():
    # 1000 ones in bfloat16 would stop counting at 256.
    values = torch.ones(1000, dtype=torch.bfloat16)
    mask = torch.ones(1000, dtype=torch.bool)
    mask[0] = False
    assert masked_sum(values, mask).dtype == torch.float32
    assert masked_sum(values, mask).item() == 999
    assert masked_mean(values, mask).item() == 1
    assert masked_mean(values.double(), mask).dtype == torch.float64
