"""The engine against `model.generate`, teacher forcing, and the exact softmax."""

import threading

import pytest
import torch
from torch.testing import assert_close

from starling.base.errors import DataError
from starling.base.seeding import derive_seed
from starling.models.interfaces import Engine, GenerationRequest, Sampling
from starling.models.torch_engine import TorchEngine
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


def test_a_prompt_that_does_not_fit_with_its_answer_is_refused_by_name(model):
    wanted = GenerationRequest("long one", (1,) * 60, Sampling(5, 0.0))
    with pytest.raises(DataError, match=r"long one: 60 prompt tokens .* 5 more .* 64 positions"):
        next(engine(model).generate([wanted]))
    [sample] = engine(model).generate([GenerationRequest("fits", (1,) * 60, Sampling(4, 0.0))])
    assert len(sample.ids) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop": ("",)}, "an empty stop string"),
        ({"stop": ("a",)}, "stop strings need an engine with a `decode`"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_by_name(model, changes, message):
    # Before anything is decoded: the first request is in order.
    sampling = Sampling(**{"max_tokens": 3, **changes})
    wanted = [*requests(PROMPTS[:1]), GenerationRequest("odd one", (1,), sampling)]
    with pytest.raises(ValueError, match=f"odd one: {message}"):
        next(engine(model).generate(wanted))


def test_an_empty_prompt_or_no_samples_are_refused(model):
    for request in (
        GenerationRequest("none", (), Sampling(3)),
        GenerationRequest("none", (1,), Sampling(3), num_samples=0),
    ):
        with pytest.raises(ValueError, match="request none: "):
            next(engine(model).generate([request]))


def drained(stream):
    ids = []
    while True:
        try:
            ids.append(next(stream))
        except StopIteration as end:
            return ids, end.value


def test_a_stream_gives_the_tokens_of_generate_one_by_one_and_the_sample(model):
    for request in requests(temperature=1.0):
        [expected] = engine(model, {2}).generate([request])
        ids, sample = drained(engine(model, {2}).stream(request))
        assert sample == expected
        assert tuple(ids) == sample.ids


def test_a_closed_stream_leaves_nothing_behind(model):
    decoder = engine(model)
    stream = decoder.stream(requests()[0])
    next(stream)
    assert len(decoder._batches) == 1
    stream.close()
    del stream
    assert not len(decoder._batches)
    assert drained(decoder.stream(requests()[0]))[0] == list(
        greedy_by_transformers(model, PROMPTS[0], 12)
    )


def test_a_stream_of_several_samples_is_refused(model):
    with pytest.raises(ValueError, match="one sample"):
        engine(model).stream(GenerationRequest("r", (1,), Sampling(3), num_samples=2))


class Counting:
    """Counts the tokens that a decoder reads."""

    def __init__(self, decoder):
        self.decoder, self.encoded, self.steps = decoder, 0, []

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def encode(self, token_ids, slots, cache):
        self.encoded += token_ids.numel()
        self.decoder.encode(token_ids, slots, cache)

    def step(self, token_ids, positions, cache):
        self.steps.append(len(token_ids))
        return self.decoder.step(token_ids, positions, cache)


@pytest.mark.parametrize("new_model", [eleven_token_model, absolute_position_model])
def test_several_samples_encode_their_prompt_once_and_are_those_of_single_requests(new_model):
    model = new_model()
    decoder = engine(model)
    decoder.decoder = counting = Counting(decoder.decoder)
    prompt, sampling = PROMPTS[0], Sampling(6, 1.3, seed=8)
    found = list(decoder.generate([GenerationRequest("r", prompt, sampling, num_samples=5)]))
    # The last token of a prompt is each sample's own.
    assert counting.encoded == len(prompt) - 1
    assert counting.steps == [5] * 6
    assert sorted(sample.index for sample in found) == list(range(5))
    assert len({sample.ids for sample in found}) > 1
    for sample in found:
        seed = derive_seed(8, "models/sample", sample.index) if sample.index else 8
        single = GenerationRequest("r", prompt, Sampling(6, 1.3, seed=seed))
        [expected] = engine(model).generate([single])
        assert sample.ids == expected.ids
        assert_close(
            torch.tensor(sample.logprobs), torch.tensor(expected.logprobs), rtol=1e-5, atol=1e-5
        )


def test_ended_rows_cost_nothing_and_waiting_ones_take_their_place(model):
    limits = [1, 9, 2, 3, 7, 1, 4, 6]
    decoder = engine(model, max_rows=3)
    decoder.decoder = counting = Counting(decoder.decoder)
    wanted = [
        GenerationRequest(f"r{n}", PROMPTS[n % 4], Sampling(limit, 0.0))
        for n, limit in enumerate(limits)
    ]
    found = list(decoder.generate(wanted))
    # Three at a time, in the order given: 0 leaves after token 1, 2 after token 2, 3 (which took
    # 0's place) after 4, 5 (which took 3's) after 5; after 9 tokens 1, 4 and 6 end together.
    order = [sample.request_id for sample in found]
    assert order[:4] == ["r0", "r2", "r3", "r5"]
    assert sorted(order[4:7]) == ["r1", "r4", "r6"]
    assert order[7:] == ["r7"]
    assert sum(counting.steps) == sum(limits)
    assert max(counting.steps) == 3
    for n, limit in enumerate(limits):
        sample = next(sample for sample in found if sample.request_id == f"r{n}")
        assert sample.ids == greedy_by_transformers(model, PROMPTS[n % 4], limit)


def test_untempered_logprobs_are_those_of_temperature_one(model):
    wanted = [
        GenerationRequest(f"r{n}", prompt, Sampling(12, 0.6, seed=n, logprobs="untempered"))
        for n, prompt in enumerate(PROMPTS)
    ]
    # One row of the other convention among them.
    tempered = GenerationRequest("t", PROMPTS[0], Sampling(9, 0.6))
    for sample in engine(model, {2}).generate([*wanted, tempered]):
        name = sample.request_id
        prompt = PROMPTS[0] if name == "t" else PROMPTS[int(name[1:])]
        expected = teacher_forced(model, prompt, sample.ids, 0.6 if name == "t" else 1.0)
        found = torch.tensor(sample.logprobs, dtype=torch.float64)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_the_likeliest_tokens_are_drawn_where_a_request_says_so(model):
    for sampling in (Sampling(12, 2.0, top_k=1), Sampling(12, 2.0, top_p=1e-6)):
        # With rows beside it that keep everything.
        one = GenerationRequest("one", PROMPTS[0], sampling)
        found = samples(engine(model), [one, *requests(temperature=3.0)])
        free = samples(engine(model), requests(temperature=3.0))
        assert found.pop("one").ids == greedy_by_transformers(model, PROMPTS[0], 12)
        assert {s.ids for s in found.values()} == {s.ids for s in free.values()}


def spell(ids):
    """Eleven tokens as text; the eleventh is of no text, as a special token."""
    return "".join("abcdefghij "[token] if token != 10 else "" for token in ids)


def test_a_stop_string_ends_a_sample_with_the_token_that_completes_it(model):
    free = greedy_by_transformers(model, PROMPTS[0], 12)
    text = spell(free)
    stop = text[4:7]
    limit = next(n for n in range(1, 13) if stop in spell(free[:n]))
    wanted = [
        GenerationRequest("stops", PROMPTS[0], Sampling(12, 0.0, stop=("zz", stop))),
        GenerationRequest("goes on", PROMPTS[0], Sampling(12, 0.0, stop=("zz",))),
    ]
    found = samples(engine(model, decode=spell), wanted)
    assert found["stops"].ids == free[:limit]
    assert found["stops"].finish_reason == "stop"
    assert found["goes on"].ids == free
    assert found["goes on"].finish_reason == "length"


def test_a_stop_string_is_found_however_far_back_it_begins(model):
    # One long string of many tokens, with silent ones inside.
    sampling = Sampling(50, 4.0, seed=3)
    [free] = engine(model).generate([GenerationRequest("r", PROMPTS[0], sampling)])
    text = spell(free.ids)
    assert 10 in free.ids[:40]
    stop = text[2:36]
    limit = next(n for n in range(1, 51) if stop in spell(free.ids[:n]))
    stopping = Sampling(50, 4.0, seed=3, stop=(stop,))
    [sample] = engine(model, decode=spell).generate([GenerationRequest("r", PROMPTS[0], stopping)])
    assert sample.ids == free.ids[:limit]


def test_a_requests_own_stop_ids_end_it_and_no_other(model):
    free = greedy_by_transformers(model, PROMPTS[0], 12)
    limit = free.index(free[3]) + 1
    wanted = [
        GenerationRequest("own", PROMPTS[0], Sampling(12, 0.0, stop_ids=(free[3],))),
        GenerationRequest("other", PROMPTS[0], Sampling(12, 0.0)),
    ]
    found = samples(engine(model), wanted)
    assert found["own"].ids == free[:limit]
    assert found["own"].finish_reason == "stop"
    assert found["other"].ids == free


def test_a_cancelled_request_ends_where_it_is_and_the_others_go_on(model):
    wanted = [
        GenerationRequest("short", PROMPTS[1], Sampling(3, 0.0)),
        GenerationRequest("running", PROMPTS[0], Sampling(12, 0.0), num_samples=2),
        GenerationRequest("other", PROMPTS[2], Sampling(12, 0.0)),
        GenerationRequest("waiting", PROMPTS[3], Sampling(12, 0.0)),
    ]
    decoder = engine(model, max_rows=4)
    found = []
    for sample in decoder.generate(wanted):
        if sample.request_id == "short":
            decoder.cancel("running")
            decoder.cancel("waiting")
            decoder.cancel("nobody")
        found.append(sample)
    by_name = {(s.request_id, s.index): s for s in found}
    assert len(found) == len(by_name) == 5
    for index in (0, 1):
        cut = by_name["running", index]
        assert cut.finish_reason == "cancelled"
        assert cut.ids == greedy_by_transformers(model, PROMPTS[0], 3)
        assert len(cut.logprobs) == 3
    waiting = by_name["waiting", 0]
    assert (waiting.ids, waiting.logprobs, waiting.finish_reason) == ((), (), "cancelled")
    assert by_name["other", 0].ids == greedy_by_transformers(model, PROMPTS[2], 12)
    # The name is free again.
    [again] = decoder.generate([wanted[3]])
    assert again.ids == greedy_by_transformers(model, PROMPTS[3], 12)


def test_a_request_cancelled_before_its_first_token_never_starts(model):
    decoder = engine(model)
    waiting = decoder.generate(requests(PROMPTS[:1]))
    decoder.cancel("r0")
    assert [(s.ids, s.finish_reason) for s in waiting] == [((), "cancelled")]


def test_a_stream_is_cancelled_from_another_thread(model):
    decoder = engine(model)
    stream = decoder.stream(requests(max_tokens=50)[0])
    ids = [next(stream), next(stream)]
    thread = threading.Thread(target=decoder.cancel, args=("r0",))
    thread.start()
    thread.join()
    rest, sample = drained(stream)
    assert rest == []
    assert sample.ids == tuple(ids)
    assert sample.finish_reason == "cancelled"


def test_a_sample_carries_the_weights_it_began_with(model):
    decoder = engine(model, max_rows=1)
    versions = []
    for sample in decoder.generate(requests(PROMPTS[:3], max_tokens=2)):
        versions.append(sample.weight_version)
        decoder.sync({}, len(versions) * 10)
    assert versions == [0, 10, 20]


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
