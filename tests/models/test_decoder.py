"""Every decoder against `generate()` and teacher forcing; packed weights can never be stale."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from starling.base.errors import ModelError
from starling.models import decoder as decoder_module
from starling.models.decoder import (
    LlamaDecoder,
    PlainDecoder,
    SlotCache,
    attention_mask,
    decoder_for,
)
from starling.models.interfaces import GenerationRequest, Sampling
from starling.models.torch_engine import TorchEngine
from tiny import sharpen

PROMPTS = [(1, 5, 3, 9, 2, 7, 4, 4), (1, 8), (1, 4, 4, 10, 6), (9,), (1, 8)]
SHAPE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 4}
MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 11}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: class, config, and whether the fast decoder runs it.
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True), True),
    "llama3": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3), True),
    "tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True), True),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, **WINDOW), True),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE), True),
    "qwen2 mixed": (
        Qwen2ForCausalLM,
        Qwen2Config(**SHAPE, **WINDOW, **MIXED, use_sliding_window=True),
        True,
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=8), True),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**SHAPE, **WINDOW, **MIXED, head_dim=8), False),
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2, bos_token_id=1, eos_token_id=None), False),
}


def family(name):
    torch.manual_seed(8)
    model_class, config, _ = FAMILIES[name]
    model = model_class(config).eval()
    sharpen(model, 12.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def engine(model, **options):
    return TorchEngine(model, stop_ids=frozenset(), pad_id=0, **options)


def requests(max_tokens=14, temperature=0.0):
    return [
        GenerationRequest(f"r{n}", prompt, Sampling(max_tokens, temperature, seed=n))
        for n, prompt in enumerate(PROMPTS)
    ]


def greedy_by_transformers(model, prompt, max_tokens):
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.no_grad()
def teacher_forced(model, prompt, ids):
    whole = [*prompt, *ids]
    logits = model(torch.tensor([whole]), use_cache=False).logits[0].double()
    distribution = torch.log_softmax(logits, -1)
    return torch.stack([distribution[t - 1, whole[t]] for t in range(len(prompt), len(whole))])


@pytest.mark.parametrize("max_rows", [128, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_says_what_transformers_generate_says(name, max_rows):
    model = family(name)
    found = {s.request_id: s for s in engine(model, max_rows=max_rows).generate(requests())}
    expected = {f"r{n}": greedy_by_transformers(model, p, 14) for n, p in enumerate(PROMPTS)}
    assert {name: sample.ids for name, sample in found.items()} == expected
    # The texts are longer than the window and say different things.
    assert len(set(expected.values())) >= 3
    assert any(len(set(ids)) > 3 for ids in expected.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_logprobs_are_those_of_a_teacher_forced_forward(name):
    model = family(name)
    for sample in engine(model, max_rows=3).generate(requests(temperature=1.0)):
        expected = teacher_forced(model, PROMPTS[int(sample.request_id[1:])], sample.ids)
        found = torch.tensor(sample.logprobs, dtype=torch.float64)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, (_, _, fast) in FAMILIES.items() if fast])
@pytest.mark.parametrize("packs", [True, False])
@torch.no_grad()
def test_the_fast_decoder_computes_the_plain_ones_logits(name, packs, monkeypatch):
    if not packs:
        monkeypatch.setattr(decoder_module, "_can_pack", lambda parameters: False)
    model = family(name)
    fast, plain = decoder_for(model), PlainDecoder(model)
    assert type(fast) is LlamaDecoder
    fast.refresh()
    caches = SlotCache(), SlotCache()
    prompts = torch.randint(11, (3, 9))
    lengths = [9, 4, 7]
    for step in range(12):
        logits = []
        positions = torch.tensor([length + step for length in lengths])
        tokens = torch.tensor([(3 * step + n) % 11 for n in range(3)])
        for decoder, cache in zip((fast, plain), caches, strict=True):
            cache.fit(3, int(positions.max()) + 1)
            if step == 0:
                decoder.encode(prompts, torch.arange(3), cache)
            logits.append(decoder.step(tokens, positions, cache))
        # The sums of 16 to 24 products in another order.
        assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
        assert logits[0].std() > 0.5


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_another_architecture_is_decoded_by_its_own_forward(name):
    assert type(decoder_for(family(name))) is PlainDecoder


def with_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_adapter(model):
    class Adapted(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj = Adapted(16, 16)


def with_growing_rotary(model):
    model.model.rotary_emb.rope_type = "dynamic"


@pytest.mark.parametrize("change", [with_hook, with_adapter, with_growing_rotary])
def test_a_changed_model_is_decoded_by_its_own_forward(change):
    model = family("llama")
    change(model)
    assert type(decoder_for(model)) is PlainDecoder


def test_a_subclass_of_a_known_class_is_not_taken_for_it():
    class Twisted(LlamaForCausalLM):
        pass

    assert type(decoder_for(Twisted(FAMILIES["llama"][1]))) is PlainDecoder


def test_a_model_that_takes_no_positions_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="BloomForCausalLM takes no explicit positions"):
        engine(model)


def test_a_model_that_keeps_another_state_is_refused():
    model = family("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        engine(model)


def trained_in_place(model, decoder):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.tensor([[1, 5, 3]]), labels=torch.tensor([[1, 5, 3]])).loss.backward()
    optimizer.step()


def trained_behind_autograd(model, decoder):
    # Neither the address nor the version counter of a parameter shows this.
    model.model.layers[1].mlp.up_proj.weight.data.mul_(-1.5)


def given_other_weights(model, decoder):
    decoder.sync(family("qwen3").state_dict(), 1)


def given_its_own_weights(model, decoder):
    for parameter in model.parameters():
        parameter.data.mul_(0.7)
    decoder.sync(model.state_dict(), 1)


def given_its_own_weights_turned_upside_down(model, decoder):
    # The same values in another order: no counter and no sum shows it.
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data.copy_(weight.data.flip(0))
    decoder.sync(model.state_dict(), 1)


def with_a_new_parameter(model, decoder):
    replaced = torch.nn.Parameter(2 * model.model.layers[0].self_attn.v_proj.weight.detach())
    model.model.layers[0].self_attn.v_proj.weight = replaced


@pytest.mark.parametrize(
    "change",
    [
        trained_in_place,
        trained_behind_autograd,
        given_other_weights,
        given_its_own_weights,
        given_its_own_weights_turned_upside_down,
        with_a_new_parameter,
    ],
)
def test_what_is_decoded_after_a_change_is_what_the_changed_model_says(change):
    torch.manual_seed(11)
    model = Qwen3ForCausalLM(FAMILIES["qwen3"][1]).eval()
    sharpen(model, 7.0)
    decoder = engine(model)
    before = {s.request_id: s for s in decoder.generate(requests(temperature=1.0))}
    change(model, decoder)
    after = {s.request_id: s for s in decoder.generate(requests(temperature=1.0))}
    assert any(after[name].logprobs != before[name].logprobs for name in before)
    for n, prompt in enumerate(PROMPTS):
        found = torch.tensor(after[f"r{n}"].logprobs, dtype=torch.float64)
        assert_close(found, teacher_forced(model, prompt, after[f"r{n}"].ids), rtol=1e-5, atol=1e-5)


def test_a_change_in_the_middle_of_an_answer_counts_from_the_next_token(monkeypatch):
    def answer():
        model = family("llama")
        stream = engine(model).stream(requests()[0])
        ids = [next(stream) for _ in range(4)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1)
        return ids + list(stream)

    packed = answer()
    monkeypatch.setattr(decoder_module, "_can_pack", lambda parameters: False)
    assert packed == answer()
    assert packed != list(engine(family("llama")).stream(requests()[0]))


def test_weights_are_packed_once_for_as_long_as_they_stay(monkeypatch):
    packs = []
    pack = LlamaDecoder._pack
    monkeypatch.setattr(LlamaDecoder, "_pack", lambda self: packs.append(1) or pack(self))
    decoder = engine(family("llama"))
    for _ in range(3):
        list(decoder.generate(requests()))
    assert len(packs) == 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_bfloat16_model_says_what_its_own_forward_says(name):
    model = family(name).to(torch.bfloat16)
    for sample in engine(model).generate(requests(temperature=1.0)):
        expected = teacher_forced(model, PROMPTS[int(sample.request_id[1:])], sample.ids)
        found = torch.tensor(sample.logprobs, dtype=torch.float64)
        # Eight bits of mantissa, logits of a few tens, a handful of roundings on the way.
        assert_close(found, expected, rtol=0.1, atol=0.5)
        assert found.max() <= 0


def test_a_cache_that_grows_or_shrinks_keeps_what_it_holds():
    cache = SlotCache()
    cache.fit(2, 5)
    like = torch.zeros(1, 2, 1, 3)
    keys, values = cache.layer(0, like)
    keys[:2, :, :5] = torch.arange(60.0).view(2, 2, 5, 3)
    values[:2, :, :5] = -keys[:2, :, :5]
    expected = keys[:2, :, :5].clone()
    for slots, length in [(2, 5), (4, 5), (4, 300), (3, 6), (2, 5)]:
        cache.fit(slots, length)
        keys, values = cache.layer(0, like)
        assert keys.shape == values.shape == (cache.slots, 2, cache.capacity, 3)
        assert cache.slots >= slots
        assert cache.capacity >= length
        assert torch.equal(keys[:2, :, :5], expected)
        assert torch.equal(values[:2, :, :5], -expected)
    # It does not stay as long as its longest row once was.
    assert cache.capacity < 150
    cache.copy(1, [0], 5)
    assert torch.equal(cache.layer(0, like)[0][0, :, :5], expected[1])


def test_a_row_sees_itself_and_what_its_window_reaches():
    mask = attention_mask(torch.tensor([0, 3]), 5, None, torch.float32)[:, 0, 0]
    assert (mask == 0).tolist() == [[True] + [False] * 4, [True] * 4 + [False]]
    windowed = attention_mask(torch.tensor([0, 3]), 5, 2, torch.float32)[:, 0, 0]
    assert (windowed == 0).tolist() == [[True] + [False] * 4, [False, False, True, True, False]]
    assert windowed.min() == -torch.inf
