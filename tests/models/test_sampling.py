"""Drawing against hand values, the exact distribution, and transformers' own warpers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import TopKLogitsWarper, TopPLogitsWarper

from starling.models import sampling
from starling.models.sampling import draw_tokens, truncate, untempered_logprobs


def by_definition(logits, temperature, uniform):
    """Walk through one row's probabilities in Python floats until the uniform is passed."""
    scaled = [float(logit) / temperature for logit in logits]
    largest = max(scaled)
    weights = [math.exp(value - largest) for value in scaled]
    target = uniform * math.fsum(weights)
    for token in range(len(weights)):
        if math.fsum(weights[: token + 1]) > target:
            return token
    return len(weights) - 1


def test_a_token_is_drawn_where_the_cumulative_distribution_passes_the_uniform():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.05, 0.15, 0.69, 0.71, 1 - 1e-9], dtype=torch.float64)
    tokens, logprobs = draw_tokens(logits, torch.ones(6), uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.6, 0.6, 0.3, 0.3]))


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = draw_tokens(logits, torch.ones(2), uniforms)
    assert tokens.tolist() == [1, 1]


# 128 is a block's width; one more than a block, and a block's half.
@pytest.mark.parametrize("vocab", [5, 64, 128, 129, 700])
@given(st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([0.1, 1.0, 6.0]))
def test_draws_are_those_of_the_definition(vocab, seed, temperature, spread):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(4, vocab, generator=generator)
    uniforms = torch.rand(4, generator=generator, dtype=torch.float64)
    tokens, _ = draw_tokens(logits, torch.full((4,), temperature), uniforms)
    expected = [
        by_definition(row, temperature, u) for row, u in zip(logits, uniforms.tolist(), strict=True)
    ]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("shift", [-1e-10, 1e-10])
def test_a_uniform_at_a_tokens_very_edge_is_decided_in_double(shift):
    # float32 exponentials are wrong by more than the shift, on either side.
    logits = 2 * torch.randn(1, 700, generator=torch.Generator().manual_seed(0))
    ends = torch.log_softmax(logits, -1).double().exp().cumsum(-1)[0]
    likely = (ends.diff() > 1e-5).nonzero()[:, 0] + 1
    uniforms = ends[likely] / ends[-1] + shift
    rows = len(likely)
    assert rows > 300
    tokens, _ = draw_tokens(logits.expand(rows, -1), torch.ones(rows), uniforms)
    # Just before its end a token is drawn, just after it the next one.
    expected = likely if shift < 0 else likely + 1
    assert (tokens == expected).sum() >= rows - 1, "the last token's end is the end of all"


def test_few_rows_need_the_pass_in_double(monkeypatch):
    rows = []
    exact = sampling._invert_in_double
    monkeypatch.setattr(
        sampling, "_invert_in_double", lambda p, u: rows.append(len(p)) or exact(p, u)
    )
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 3000, generator=generator)
    uniforms = torch.rand(500, generator=generator, dtype=torch.float64)
    draw_tokens(logits, torch.ones(500), uniforms)
    assert sum(rows) < 25


def test_greedy_rows_take_the_largest_and_report_temperature_one():
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    temperatures = torch.tensor([0.0, 0.5])
    tokens, logprobs = draw_tokens(
        logits, temperatures, torch.tensor([0.0, 0.0], dtype=torch.float64)
    )
    assert tokens.tolist() == [1, 0]
    total = 1 + math.exp(2) + math.exp(1)
    tempered = 1 + math.exp(4) + math.exp(2)
    assert_close(logprobs, torch.tensor([2 - math.log(total), -math.log(tempered)]))
    assert_close(
        untempered_logprobs(logits, tokens),
        torch.tensor([2 - math.log(total), -math.log(total)]),
    )


@given(st.integers(0, 2**32), st.integers(0, 14), st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_what_truncation_keeps_is_what_transformers_warpers_keep(seed, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 12, generator=generator)
    expected = logits.clone()
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    logprobs = torch.log_softmax(logits, -1)
    found = truncate(logprobs, torch.full((3,), top_k), torch.full((3,), top_p))
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found[found.isfinite()], logprobs[found.isfinite()])


def test_truncation_keeps_ties_at_k_and_always_the_likeliest():
    logprobs = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    by_k = truncate(logprobs, torch.tensor([2]), torch.tensor([1.0]))
    assert by_k.isfinite().tolist() == [[True, True, True, True]]
    by_p = truncate(logprobs, torch.tensor([0]), torch.tensor([1e-9]))
    assert by_p.isfinite().tolist() == [[True, False, False, False]]


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    return float(((counts - expected).square()[kept] / expected[kept]).sum())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.8), (6, 0.7)])
def test_truncated_draws_follow_the_renormalised_distribution(top_k, top_p):
    # At most ten degrees of freedom: a right sampler exceeds 35.6 once in ten thousand.
    count, temperature = 8000, 1.5
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.0, -0.5, 1.2, 0.7, 0.1, 0.3, -1.0]])
    warped = logits / temperature
    if top_k:
        warped = TopKLogitsWarper(top_k)(None, warped)
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    exact = warped[0].double().softmax(-1)
    generator = torch.Generator().manual_seed(4)
    tokens, logprobs = draw_tokens(
        logits.expand(count, -1),
        torch.full((count,), temperature),
        torch.rand(count, generator=generator, dtype=torch.float64),
        torch.full((count,), top_k),
        torch.full((count,), top_p),
    )
    assert chi_square(torch.bincount(tokens, minlength=11).double(), exact) < 35.6
    # Logprobs are of the whole distribution, whatever was ruled out.
    whole = torch.log_softmax(logits[0] / temperature, -1)
    assert_close(logprobs, whole[tokens])


def test_rows_have_their_own_truncation():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).expand(3, 4)
    last = torch.full((3,), 1 - 1e-9, dtype=torch.float64)
    tokens, _ = draw_tokens(
        logits, torch.ones(3), last, torch.tensor([0, 2, 0]), torch.tensor([1.0, 1.0, 0.9])
    )
    # 0.64, 0.24, 0.09, 0.03: three tokens reach 0.9.
    assert tokens.tolist() == [3, 1, 2]
