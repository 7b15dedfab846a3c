"""The engine against `model.generate`, teacher forcing, and the exact softmax."""

import pytest
import torch
from torch.testing import assert_close

from starling.base.errors import DataError
from starling.models.interfaces import Engine, GenerationRequest, Sampling
from starling.models.torch_engine import TorchEngine, sample_tokens
from tiny import absolute_position_model, eleven_token_model

PROMPTS = [(1, 5, 3, 9, 2, 7, 4, 4), (1, 8), (1, 4, 4, 10, 6), (9,)]
NEVER = frozenset[int]()


@pytest.fixture(scope="module")
def model():
    return eleven_token_model()


def engine(model, stop_ids=NEVER, **options):
    return TorchEngine(model, stop_ids=frozenset(stop_ids), pad_id=0, **options)


def requests(prompts=PROMPTS, max_tokens=12, temperature=0.0):
    return [
        GenerationRequest(f"r{n}", tuple(prompt), Sampling(max_tokens, temperature, seed=n))
        for n, prompt in enumerate(prompts)
    ]


def samples(engine, wanted):
    found = list(engine.generate(wanted))
    assert len(found) == len({sample.request_id for sample in found}) == len(wanted)
    return {sample.request_id: sample for sample in found}


def greedy_by_transformers(model, prompt, max_tokens, stop_ids=()):
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.no_grad()
def teacher_forced(model, prompt, ids, temperature):
    """Logprobs of the response's tokens from one unpadded, uncached forward."""
    whole = [*prompt, *ids]
    logits = model(torch.tensor([whole]), use_cache=False).logits[0].double() / temperature
    distribution = torch.log_softmax(logits, -1)
    return torch.stack([distribution[t - 1, whole[t]] for t in range(len(prompt), len(whole))])


def test_the_engine_is_an_engine(model):
    assert isinstance(engine(model), Engine)


@pytest.mark.parametrize("max_rows", [128, 3, 1])
def test_greedy_tokens_of_ragged_prompts_are_those_of_transformers_generate(model, max_rows):
    found = samples(engine(model, max_rows=max_rows), requests())
    for n, prompt in enumerate(PROMPTS):
        assert found[f"r{n}"].ids == greedy_by_transformers(model, prompt, 12)
    assert len({sample.ids for sample in found.values()}) == len(PROMPTS)


def test_padding_takes_no_position():
    # Rotary positions are relative and would not show it.
    model = absolute_position_model()
    found = samples(engine(model), requests())
    for n, prompt in enumerate(PROMPTS):
        assert found[f"r{n}"].ids == greedy_by_transformers(model, prompt, 12)
        expected = teacher_forced(model, prompt, found[f"r{n}"].ids, 1.0)
        logprobs = torch.tensor(found[f"r{n}"].logprobs, dtype=torch.float64)
        assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)


def test_greedy_tokens_with_stops_are_those_of_transformers_generate(model):
    free = greedy_by_transformers(model, PROMPTS[0], 12)
    stops = {free[3]}
    found = samples(engine(model, stops), requests())
    for n, prompt in enumerate(PROMPTS):
        expected = greedy_by_transformers(model, prompt, 12, stops)
        assert found[f"r{n}"].ids == expected
        ended = expected[-1] in stops
        assert found[f"r{n}"].finish_reason == ("stop" if ended else "length")
    # The end marker is part of the sample, once, at its end.
    first = found["r0"].ids
    assert first == free[: free.index(free[3]) + 1]
    assert {sample.finish_reason for sample in found.values()} == {"stop", "length"}


def test_each_row_has_its_own_limit(model):
    limits = [1, 5, 3, 7]
    wanted = [
        GenerationRequest(f"r{n}", prompt, Sampling(limit, 0.0))
        for n, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True))
    ]
    found = samples(engine(model), wanted)
    for n, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True)):
        assert found[f"r{n}"].ids == greedy_by_transformers(model, prompt, limit)
        assert found[f"r{n}"].finish_reason == "length"


def test_a_stop_at_the_last_allowed_token_counts_as_a_stop(model):
    free = greedy_by_transformers(model, PROMPTS[0], 4)
    limit = free.index(free[3]) + 1
    [sample] = engine(model, {free[3]}).generate(requests(PROMPTS[:1], max_tokens=limit))
    assert sample.ids == free[:limit]
    assert sample.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_logprobs_are_those_of_a_teacher_forced_forward(model, temperature):
    wanted = requests(PROMPTS * 3, temperature=temperature)
    for n, sample in enumerate(samples(engine(model, {2}), wanted).values()):
        prompt = wanted[int(sample.request_id[1:])].prompt_ids
        assert len(sample.logprobs) == len(sample.ids), n
        expected = teacher_forced(model, prompt, sample.ids, temperature)
        found = torch.tensor(sample.logprobs, dtype=torch.float64)
        # Cached and batched products round differently from one full forward.
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_one_batch_have_their_own_temperature(model):
    temperatures = [0.0, 0.5, 1.0, 4.0]
    wanted = [
        GenerationRequest(f"r{n}", PROMPTS[0], Sampling(3 + 5 * n, temperature, seed=5))
        for n, temperature in enumerate(temperatures)
    ]
    found = samples(engine(model), wanted)
    assert found["r0"].ids == greedy_by_transformers(model, PROMPTS[0], 3)
    # Rows end one after another, so that those that go on change their place in the batch.
    for n, temperature in enumerate(temperatures):
        sample = found[f"r{n}"]
        # A greedy row reports the logprobs of temperature 1.
        expected = teacher_forced(model, PROMPTS[0], sample.ids, temperature or 1.0)
        found_logprobs = torch.tensor(sample.logprobs, dtype=torch.float64)
        assert_close(found_logprobs, expected, rtol=1e-5, atol=1e-5)
        assert len(sample.ids) == 3 + 5 * n


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


@torch.no_grad()
def test_the_sampled_tokens_follow_the_exact_softmax():
    # Ten degrees of freedom: a right sampler exceeds 35.6 once in ten thousand; seeds are fixed.
    limit, temperature, count = 35.6, 1.7, 6000
    model = eleven_token_model(1)
    sampler = engine(model, max_rows=2000)
    found = samples(sampler, requests([PROMPTS[2]] * count, 2, temperature)).values()
    first = torch.softmax(
        model(torch.tensor([PROMPTS[2]])).logits[0, -1].double() / temperature, dim=-1
    )
    continued = torch.tensor([[*PROMPTS[2], token] for token in range(11)])
    second_given_first = torch.softmax(model(continued).logits[:, -1].double() / temperature, -1)
    second = first @ second_given_first
    for position, exact in enumerate((first, second)):
        assert exact.min() * count > 5, "too few expected for a chi-square test"
        drawn = torch.tensor([sample.ids[position] for sample in found])
        assert chi_square(torch.bincount(drawn, minlength=11).double(), exact) < limit


def test_the_limit_of_the_chi_square_test_would_see_a_small_bias():
    exact = torch.tensor([0.2] + [0.08] * 10, dtype=torch.float64)
    biased = exact.clone()
    biased[0] -= 0.03
    biased[1] += 0.03
    assert chi_square(6000 * biased, exact) > 35.6


def test_a_sample_does_not_depend_on_order_or_companions(model):
    wanted = requests(PROMPTS * 2, temperature=1.3)
    together = samples(engine(model, {2}), wanted)
    reordered = samples(engine(model, {2}, max_rows=3), wanted[::-1])
    alone = {request.id: next(engine(model, {2}).generate([request])) for request in wanted}
    longer = samples(engine(model, {2}), [*wanted, *requests_named("x", max_tokens=40)][::-1])
    for name, sample in together.items():
        for other in (reordered[name], alone[name], longer[name]):
            assert other.ids == sample.ids
            # Rounding of products of other batch shapes.
            assert_close(
                torch.tensor(other.logprobs), torch.tensor(sample.logprobs), rtol=1e-5, atol=1e-5
            )


def requests_named(name, max_tokens):
    return [GenerationRequest(name, (1, 2), Sampling(max_tokens, 1.0, seed=99))]


def test_the_same_seed_gives_the_same_sample_and_another_seed_another(model):
    def ids(seed):
        [sample] = engine(model).generate(
            [GenerationRequest("r", PROMPTS[1], Sampling(20, 2.0, seed))]
        )
        return sample.ids

    assert ids(1) == ids(1)
    assert len({ids(seed) for seed in range(8)}) == 8


def test_sampling_leaves_the_global_generator_alone(model):
    state = torch.get_rng_state()
    samples(engine(model), requests(temperature=1.0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_token_is_drawn_where_the_cumulative_distribution_passes_the_uniform():
    logits = torch.tensor([[0.1, 0.6, 0.3]]).log().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.05, 0.15, 0.69, 0.71, 1 - 1e-9], dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, torch.ones(6), uniforms)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    assert_close(logprobs.exp(), torch.tensor([0.1, 0.1, 0.6, 0.6, 0.3, 0.3]))


def test_an_impossible_token_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
    uniforms = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    tokens, _ = sample_tokens(logits, torch.ones(2), uniforms)
    assert tokens.tolist() == [1, 1]


def test_a_prompt_that_does_not_fit_with_its_answer_is_refused_by_name(model):
    wanted = GenerationRequest("long one", (1,) * 60, Sampling(5, 0.0))
    with pytest.raises(DataError, match=r"long one: 60 prompt tokens .* 5 more .* 64 positions"):
        next(engine(model).generate([wanted]))
    [sample] = engine(model).generate([GenerationRequest("fits", (1,) * 60, Sampling(4, 0.0))])
    assert len(sample.ids) == 4


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_limit_that_allows_no_token_is_refused(model, max_tokens):
    # The row would otherwise end without a sample, and nobody would miss it.
    wanted = [*requests(PROMPTS[:1]), GenerationRequest("none", (1,), Sampling(max_tokens))]
    with pytest.raises(ValueError, match="none"):
        list(engine(model).generate(wanted))


def test_stream_gives_the_tokens_of_generate_one_by_one(model):
    for request in requests(temperature=1.0):
        [sample] = engine(model, {2}).generate([request])
        assert tuple(engine(model, {2}).stream(request)) == sample.ids


def test_sync_brings_weights_and_version_and_nothing_half():
    model, other = eleven_token_model(0), eleven_token_model(1)
    decoder = engine(model)
    [before] = decoder.generate(requests(PROMPTS[:1]))
    assert before.weight_version == 0
    decoder.sync(other.state_dict(), 7)
    [after] = decoder.generate(requests(PROMPTS[:1]))
    assert after.weight_version == 7
    assert after.ids == greedy_by_transformers(other, PROMPTS[0], 12) != before.ids
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert model.lm_head.weight is not other.lm_head.weight


def test_sync_of_the_models_own_weights_keeps_them():
    model = eleven_token_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = engine(model)
    decoder.sync(model.state_dict(), 3)
    assert decoder.version == 3
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_sync_refuses_an_unknown_name_and_changes_nothing():
    model, other = eleven_token_model(0), eleven_token_model(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = engine(model)
    with pytest.raises(ValueError, match=r"does not have: layer\.9"):
        decoder.sync(other.state_dict() | {"layer.9": torch.zeros(1)}, 7)
    assert decoder.version == 0
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
