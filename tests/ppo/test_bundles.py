"""What one forward reads: rows of one prompt together, and the state that predicts each token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rollouts import start_of
from starling.models.packing import PackedRow, prepared
from starling.ppo.bundles import (
    Bundle,
    Reading,
    bundle,
    bundle_batches,
    packed_predictors,
    padded_predictors,
)

A, B = (20, 21, 22), (30,)


def test_neighbours_with_one_prompt_stand_together_and_at_most_so_many():
    prompts, responses = [A, A, A, B, A], [(1,), (2, 3), (4,), (5,), (6,)]
    found = bundle(prompts, responses, [0, 1, 2, 3, 4], most=None)
    assert found == [
        Bundle(A, ((1,), (2, 3), (4,)), (0, 1, 2)),
        Bundle(B, ((5,),), (3,)),
        Bundle(A, ((6,),), (4,)),
    ]
    assert [each.rows for each in bundle(prompts, responses, [0, 1, 2, 4], most=2)] == [
        (0, 1),
        (2, 4),
    ]
    # The rows that are asked for alone, in their order.
    assert bundle(prompts, responses, [3, 1], most=4) == [
        Bundle(B, ((5,),), (3,)),
        Bundle(A, ((2, 3),), (1,)),
    ]
    assert bundle(prompts, responses, [], most=1) == []


def test_a_prompt_counts_once_for_all_of_its_responses_and_no_last_token_does():
    assert Bundle(A, ((1,), (2, 3)), (0, 1)).num_tokens == 3 + 0 + 1


def test_a_single_response_is_one_sequence_with_its_prompt_and_several_share_it():
    # A response's last token predicts none of them, and is not read.
    assert Bundle(A, ((1, 2, 3),), (0,)).packed_row == PackedRow((20, 21, 22, 1, 2), (), 2)
    several = Bundle(A, ((1, 2), (3,), (4, 5)), (0, 1, 2))
    assert several.packed_row == PackedRow(A, ((1,), (4,)), 2)
    assert Bundle(A, ((1,), (2,)), (0, 1)).packed_row == PackedRow(A, (), 2)


def of_sizes(*sizes):
    """Bundles in which so many tokens are read, rows counting from 0; a pair has as many rows."""
    made, row = [], 0
    for size in sizes:
        tokens, rows = size if isinstance(size, tuple) else (size, 1)
        responses = ((9,) * tokens,) + ((9,),) * (rows - 1)
        made.append(Bundle((1,), responses, tuple(range(row, row + rows))))
        row += rows
    return made


def test_batches_hold_so_many_tokens_and_rows_at_most_long_ones_first():
    bundles = of_sizes(4, 20, 9, 5, 6)
    by_tokens = bundle_batches(bundles, "cpu", tokens=11, most=None)
    assert [[each.num_tokens for each in batch] for batch in by_tokens] == [[20], [9], [6, 5], [4]]
    by_rows = bundle_batches(of_sizes((8, 2), (7, 1), (6, 3), (5, 1)), "cpu", tokens=99, most=3)
    assert [[len(each.rows) for each in batch] for batch in by_rows] == [[2, 1], [3], [1]]
    assert bundle_batches([], "cpu", tokens=9, most=None) == []
    # The device's own number: 1024 tokens on a CPU.
    assert [
        len(batch) for batch in bundle_batches(of_sizes(*[256] * 9), "cpu", tokens=None, most=None)
    ] == [4, 4, 1]


@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=12),
    tokens=st.integers(1, 60),
    most=st.none() | st.integers(1, 5),
)
def test_every_bundle_is_read_once_and_no_batch_could_take_the_next(sizes, tokens, most):
    bundles = of_sizes(*sizes)
    batches = bundle_batches(bundles, "cpu", tokens=tokens, most=most)
    assert sorted(row for batch in batches for each in batch for row in each.rows) == list(
        range(len(sizes))
    )
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        used = sum(each.num_tokens for each in batch)
        assert used <= tokens or len(batch) == 1
        assert most is None or len(batch) <= most
        if following is not None and len(batch) != most:
            assert used + following[0].num_tokens > tokens


BUNDLES = [
    Bundle((1, 43), ((94,), (95,)), (8, 9)),
    Bundle((1, 40, 41), ((50, 51, 52), (60,), (70, 71)), (3, 4, 5)),
    Bundle((1, 42), ((80, 81),), (0,)),
    Bundle((1,), ((90,), (91, 92)), (1, 2)),
    Bundle((1,), ((93,),), (7,)),
]


def test_tokens_and_rows_stand_in_the_bundles_order():
    reading = Reading(BUNDLES, "cpu")
    assert reading.rows == [8, 9, 3, 4, 5, 0, 1, 2, 7]
    assert reading.targets.tolist() == [94, 95, 50, 51, 52, 60, 70, 71, 80, 81, 90, 91, 92, 93]


def test_each_token_is_read_where_the_one_before_it_stands():
    reading = Reading(BUNDLES, "cpu")
    flat = reading.packed.token_ids[0][reading.packed.reads][reading.predictors]
    # The last of the prompt before a response's first token, then the response's own.
    assert flat.tolist() == [43, 43, 41, 50, 51, 41, 41, 70, 42, 80, 1, 1, 91, 1]


@pytest.mark.parametrize("kind", ["mistral", "gpt2"])
def test_packed_and_padded_states_are_those_of_each_conversation_alone(kind):
    model = start_of(kind).model
    apart = [
        model(torch.tensor([each.prompt + response]), output_hidden_states=True).hidden_states[-1][
            0, len(each.prompt) - 1 : -1
        ]
        for each in BUNDLES
        for response in each.responses
    ]
    expected = torch.cat(apart)
    weight = torch.linspace(-1, 1, expected.numel()).view_as(expected)
    wanted = gradient(model, (expected * weight).sum())
    reading = Reading(BUNDLES, "cpu")
    for states in (
        padded_predictors(model, reading, pad_id=0),
        padded_predictors(model, reading, pad_id=99),
        packed_predictors(prepared(model), reading),
    ):
        assert_close(states, expected, rtol=1e-5, atol=1e-5)
        found = gradient(model, (states * weight).sum())
        assert (found - wanted).norm() < 1e-5 * wanted.norm()


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
